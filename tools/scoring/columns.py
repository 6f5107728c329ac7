"""What is measured, in the order of a table's columns. Apart, so that a page of scores needs no scoring package."""

COLUMNS = {
    "documents": "documents", "exact_match": "EM", "f1": "F1", "accuracy": "accuracy",
    "rouge1": "R1", "rouge2": "R2", "rougeL": "RL", "rougeLsum": "RLsum", "bleu": "BLEU", "sentence_bleu": "sBLEU",
    "similarity": "similarity", "slots": "slots", "supported": "supported",
    "distinct1": "distinct-1", "distinct2": "distinct-2", "self_bleu": "self-BLEU",
    "repetition": "repeated", "words": "words", "length_ratio": "length", "empty": "empty", "short": "short"}
"""Name of a value -> head of its column."""
