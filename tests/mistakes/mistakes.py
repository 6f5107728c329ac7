"""Mistakes a user can make, and the one line each of them gets: the source of tests and of docs/errors.md.

    python tests/mistakes/mistakes.py > docs/errors.md
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.trainer.launching import SMALL

DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.5, "zero_optimization": {"stage": 2}}
GOOD = '{"src": "bad cafe", "trg": "bead"}\n'
OTHER = "".join(json.dumps({"src": f"{word} {word[::-1]}", "trg": word}) + "\n" for word in (
    "quick", "jumps", "vexing", "zebra", "fjord", "waltz", "nymph", "glyph", "sphinx", "quartz", "vow", "judge"))


@dataclass(frozen=True)
class Mistake:
    """One mistake on top of a run that would work: files in the current folder are `train.jsonl`, `valid.jsonl`,
    `ds.json` (DS_CONFIG), and with `resumes` the folder `run` of a run of 2 steps on `saved_by` ranks.
    """

    stage: str
    what: str
    says: str
    """What stands after `error: ` (in a line of its own, if `code` is 0); `…` stands for any text."""
    code: int = 80
    set: tuple[str, ...] = ()
    """Values of --set."""
    arguments: tuple[str, ...] = ()
    alone: bool = False
    """The arguments are the whole command line."""
    ds: dict = field(default_factory=dict)
    """What is added to the DeepSpeed JSON."""
    files: dict[str, str | bytes] = field(default_factory=dict)
    """Files written over those of the run."""
    links: dict[str, str] = field(default_factory=dict)
    """Links in the place of files: /dev/full is a device without space."""
    disk: str = ""
    """A folder with its own file system of `disk_kb`."""
    disk_kb: int = 1000
    resumes: bool = False
    held: bool = False
    """Another process has the folder `run` open."""
    port_taken: bool = False
    """Another process listens on the first rank's port."""
    saved_by: int = 0
    """Ranks of the run in the folder `run`; 0: as many as now."""
    ranks: tuple[int, ...] = (1,)
    """Numbers of processes the fast tests try; the slow ones try the rest of ALL_RANKS."""

    def command(self) -> list[str]:
        """Arguments of trainer/run.py."""
        if self.alone:
            return list(self.arguments)
        settings = {**SMALL, "data.train": "train.jsonl", "data.valid": "valid.jsonl", "data.test": "",
                    "data.cache_dir": "cache", "train.steps": 2}
        pairs = [*(f"{key}={value}" for key, value in settings.items()), *self.set]
        return ["--ds_config", "ds.json", "--run_dir", "run", *(word for pair in pairs for word in ("--set", pair)),
                *self.arguments]


BOTH = ALL_RANKS = (1, 2)
_DATA = "…train.jsonl"


def _documents(count: int, source_words: int, target_words: int) -> str:
    """JSON lines of documents of so many made-up words, no two alike."""
    def words(document: int, number: int) -> str:
        return " ".join(f"{(document * 1000 + k) * 40503 % 65521:x}" for k in range(number))

    return "".join(json.dumps({"src": words(document, source_words), "trg": words(document, target_words)}) + "\n"
                   for document in range(count))


MISTAKES = [
    # ---- command line
    Mistake("Command line", "no DeepSpeed JSON", "command line: the following arguments are required: --ds_config "
            "(--help explains all of it)", alone=True, ranks=BOTH),
    Mistake("Command line", "an option that does not exist", "command line: unrecognized arguments: --rate 1 (…",
            arguments=("--rate", "1")),
    Mistake("Command line", "a preset that does not exist", "command line: argument --preset: invalid choice: 'huge' "
            "(choose from …tiny…base…", arguments=("--preset", "huge"), ranks=BOTH),
    Mistake("Command line", "a key of the run configuration as an option", "command line: unrecognized arguments: "
            "--steps 60; did you mean --set train.steps=…? (--help explains all of it)", arguments=("--steps", "60")),
    Mistake("Command line", "a port that another run uses", "MASTER_PORT: … is taken, probably by another run on this "
            "machine: give the launcher another --master_port (torchrun: --master-port), or set MASTER_PORT",
            port_taken=True),
    Mistake("Command line", "a value without a key", "--set: must look like train.steps=100, not 'train.steps'",
            set=("train.steps",)),
    Mistake("Command line", "preset by --set", "--set: cannot choose the preset: use --preset", set=("preset=base",)),
    Mistake("Command line", "a configuration file that is missing", "--config: cannot read mine.toml (…No such file…",
            arguments=("--config", "mine.toml")),
    Mistake("Command line", "a configuration file of another kind", "--config: mine.yaml must end in .toml or .json",
            arguments=("--config", "mine.yaml"), files={"mine.yaml": ""}),
    Mistake("Command line", "a file that chooses another preset than the command line",
            "--preset: is tiny, but mine.toml is written for preset = 'base': leave out one of the two",
            arguments=("--preset", "tiny", "--config", "mine.toml"), files={"mine.toml": 'preset = "base"\n'}),
    # ---- run configuration
    Mistake("Run configuration", "a file that is not TOML", "--config: mine.toml is not TOML: …(at line 2, column 1)",
            arguments=("--config", "mine.toml"), files={"mine.toml": "[train]\n=\n"}),
    Mistake("Run configuration", "a misspelt key", "train.step: is not a key of the run configuration (--set); did you "
            "mean train.steps?", set=("train.step=3",), ranks=BOTH),
    Mistake("Run configuration", "a misspelt key in a file", "train.stepz: is not a key of the run configuration "
            "(mine.toml); did you mean train.steps?", arguments=("--config", "mine.toml"),
            files={"mine.toml": "[train]\nstepz = 3\n"}),
    Mistake("Run configuration", "a key in the wrong section", "train.lr: is not a key of the run configuration "
            "(--set); did you mean optim.lr?", set=("train.lr=1",)),
    Mistake("Run configuration", "a key of the DeepSpeed JSON", "optim.gradient_clipping: is not a key of the run "
            "configuration (--set); it belongs to the DeepSpeed JSON (--ds_config)",
            set=("optim.gradient_clipping=1",)),
    Mistake("Run configuration", "a value of the wrong type", "train.steps: must be an integer, not 'ten' (--set)",
            set=("train.steps=ten",)),
    Mistake("Run configuration", "text where a file needs a number", "train.steps: must be an integer, not '10' "
            "(mine.toml)", arguments=("--config", "mine.toml"), files={"mine.toml": '[train]\nsteps = "10"\n'}),
    Mistake("Run configuration", "an odd window", "model.attention.window: must be a positive even number (half of it "
            "to each side) or [left, right], not 7", set=("model.attention.window=7",), ranks=BOTH),
    Mistake("Run configuration", "a window of 0", "model.attention.window: must be a positive even number (half of it "
            "to each side) or [left, right], not 0", set=("model.attention.window=0",)),
    Mistake("Run configuration", "an unknown kind of global token", "model.attention.global_tokens: 'firsts' is none "
            "of none, prefix:k, separators, markers, positions:0,5,9 (joined by +)",
            set=("model.attention.global_tokens=firsts",)),
    Mistake("Run configuration", "dilations that the heads cannot share", "model.attention.dilation: 3 values in … "
            "cannot share model.attention.heads = 2 equally: use a number of values that divides it",
            set=("model.attention.dilation=1,2,4",)),
    Mistake("Run configuration", "heads that do not divide the width", "model.attention.heads: 3 heads do not divide "
            "model.width = 32: choose a number that does", set=("model.attention.heads=3",)),
    Mistake("Run configuration", "heads that are too narrow", "model.attention.heads: width 32 / 8 heads gives head "
            "width 4; it must be a multiple of 8, or even with model.attention.backend = reference",
            set=("model.attention.heads=8",)),
    Mistake("Run configuration", "more experts for a token than there are", "model.moe.top_k: 5 of 4 experts: must "
            "lie between 1 and model.moe.experts", set=("model.moe.top_k=5",)),
    Mistake("Run configuration", "a name that is not one of the choices", "sample.solver: is 'euler', must be one of "
            "…dpmpp2m, …ancestral…", set=("sample.solver=euler",)),
    Mistake("Run configuration", "DiffuSeq's network with what it has no place for", "model.input: is bayes, but "
            "model.network = bert only knows noisy: set it so, or choose model.network = sparse",
            set=("model.network=bert",)),
    Mistake("Run configuration", "documents longer than learned positions", "model.max_positions: is 32, but a "
            "document may have 64 tokens: raise it, or lower data.max_source_tokens",
            arguments=("--recipe", "diffuseq"),
            set=("data.draws_per_source=1", "model.moe.experts=1", "model.max_positions=32")),
    Mistake("Run configuration", "discrete steps of a continuous schedule", "model.diffusion.steps: log_snr is a "
            "schedule of continuous time: set this to 0, or the schedule to sqrt, cosine or linear",
            set=("model.diffusion.steps=2000",)),
    Mistake("Run configuration", "a loss over sources that predicts tokens", "model.diffusion.loss_over: document "
            "compares predicted embeddings, sources' included: set model.diffusion.loss to mse",
            set=("model.diffusion.loss_over=document",)),
    Mistake("Run configuration", "DiffuSeq-v2's solver for another network", "sample.solver: diffuseq_v2_compat "
            "repeats what the original does with its own network: set model.network to bert, or choose one of ddim, …",
            set=("sample.solver=diffuseq_v2_compat",)),
    Mistake("Run configuration", "guidance with DiffuSeq-v2's solver", "sample.guidance: is 2.0, which "
            "diffuseq_v2_compat knows nothing of: set it to 1.0, or choose another sample.solver",
            arguments=("--recipe", "diffuseq"), set=("model.diffusion.source_dropout=0.1", "sample.guidance=2",
                                                     "sample.clamp=false", "sample.solver=diffuseq_v2_compat",
                                                     "model.moe.experts=1", "data.draws_per_source=1",
                                                     "model.max_positions=512")),
    Mistake("Run configuration", "a learning rate of 0", "optim.lr: must be positive, not 0.0", set=("optim.lr=0",)),
    Mistake("Run configuration", "rows too short for the targets", "data.row_tokens: 16 tokens cannot hold "
            "data.draws_per_source x data.max_target_tokens = 2 x 16: raise it or lower the others",
            set=("data.row_tokens=16",)),
    Mistake("Run configuration", "a vocabulary smaller than the bytes", "data.vocab_size: is 100; bytes and special "
            "tokens alone take 266: give at least 320", set=("data.vocab_size=100",)),
    Mistake("Run configuration", "a misspelt key of a named corpus", "data.train.a.wight: is not a key of the run "
            "configuration (--set); did you mean data.train.a.weight?",
            set=('data.train={a={documents="train.jsonl", wight=2}}',)),
    Mistake("Run configuration", "a corpus that no epoch holds", "data.train.a.weight: must be positive, not 0.0",
            set=('data.train={a={documents="train.jsonl", weight=0}}',)),
    Mistake("Run configuration", "weights in evaluation", "data.valid.a.weight: only applies to data.train: evaluation "
            "takes every document once. Remove it", set=('data.valid={a={documents="valid.jsonl", weight=2}}',)),
    Mistake("Run configuration", "several copies of a target in joint conditioning", "data.draws_per_source: is 2, but "
            "in joint conditioning a source has one noised copy: set it to 1, or model.diffusion.conditioning to "
            "cached", set=("model.diffusion.conditioning=joint",)),
    Mistake("Run configuration", "mean squared error with the posterior's skip", "model.diffusion.loss: mse predicts "
            "an embedding, which has no logits for model.bayes_skip: set that to false",
            set=("model.diffusion.loss=mse",)),
    Mistake("Run configuration", "gaps in targets whose source is cached", "model.diffusion.infilling: needs "
            "model.diffusion.conditioning = joint: a cached source is a prefix that does not see its target",
            set=("model.diffusion.infilling=0.5",)),
    Mistake("Run configuration", "guidance for a model that is never without its source", "sample.guidance: is 2.0, "
            "but the model is trained with model.diffusion.source_dropout = 0 and never sees an empty source: set it "
            "to 1, or train with a source_dropout of about 0.1",
            set=("sample.guidance=2",)),
    Mistake("Run configuration", "sharpening a model that predicts embeddings", "sample.temperature: is 0.5, which "
            "sharpens predicted tokens, but with model.diffusion.loss = mse the model predicts embeddings: set it to 1",
            set=("model.diffusion.loss=mse", "model.bayes_skip=false", "sample.temperature=0.5")),
    Mistake("Run configuration", "a range of noise that the schedule ignores", "model.diffusion.log_snr_range: only "
            "applies to schedule = log_snr, not sqrt",
            set=("model.diffusion.schedule=sqrt", "model.diffusion.log_snr_range=[-6, 0]")),
    Mistake("Run configuration", "expert shards that do not divide experts and ranks", "train.expert_parallel_size: is "
            "3, but must divide model.moe.experts = 4 and the number of ranks, …: use …",
            set=("train.expert_parallel_size=3",)),
    Mistake("Run configuration", "an unknown way of activation checkpointing", "train.activation_checkpointing: is "
            "'some', must be none, all or every:n with n from 1 to model.layers = 2",
            set=("train.activation_checkpointing=some",)),
    Mistake("Run configuration", "steps to profile that are no range", "train.profile_steps: must look like 20-22 "
            "(first and last step, from 1 on) or be empty, not '5'", set=('train.profile_steps="5"',)),
    Mistake("Run configuration", "a memory trace without steps", "train.profile_memory: is recorded in the steps of "
            "train.profile_steps: set these as well", set=("train.profile_memory=true",)),
    Mistake("Run configuration", "a memory trace on a CPU", "train.profile_memory: records CUDA memory, and this run "
            "is on a CPU: set it to false", set=("train.profile_memory=true", "train.profile_steps=1-2")),
    # ---- DeepSpeed JSON
    Mistake("DeepSpeed JSON", "no such file", "--ds_config: there is no file none.json; shipped: ds_configs/…",
            arguments=("--ds_config", "none.json"), ranks=BOTH),
    Mistake("DeepSpeed JSON", "not JSON", "--ds_config: ds.json, line 3, column 1: not JSON (…); comments and "
            "trailing commas are not allowed", files={"ds.json": '{\n "bf16": {"enabled": true},\n}\n'}, ranks=BOTH),
    Mistake("DeepSpeed JSON", "a list", "--ds_config: ds.json must hold one JSON object, not list",
            files={"ds.json": "[]"}),
    Mistake("DeepSpeed JSON", "a key that is given twice", "bf16: is given twice in ds.json: keep one",
            files={"ds.json": '{"bf16": {}, "bf16": {}}'}),
    Mistake("DeepSpeed JSON", "a misspelt key", "zero_optimizaton: is not a supported key of ds.json; did you mean "
            "zero_optimization?", ds={"zero_optimizaton": {"stage": 2}}),
    Mistake("DeepSpeed JSON", "a misspelt key in a section", "zero_optimization.stag: is not a supported key of "
            "ds.json; did you mean zero_optimization.stage?", ds={"zero_optimization": {"stag": 2}}),
    Mistake("DeepSpeed JSON", "a section of the run configuration", "train: is not a supported key of ds.json; it "
            "belongs to the run configuration (--config or --set): train.steps, train.seed, train.log_every",
            ds={"train": {"steps": 5}}),
    Mistake("DeepSpeed JSON", "a key of the run configuration", "lr: is not a supported key of ds.json; it belongs to "
            "the run configuration (--config or --set): optim.lr", ds={"lr": 0.1}),
    Mistake("DeepSpeed JSON", "an optimizer", "optimizer: belongs to the run configuration: set optim.lr, "
            "optim.weight_decay there (ds.json)", ds={"optimizer": {"type": "AdamW"}}, ranks=BOTH),
    Mistake("DeepSpeed JSON", "a scheduler", "scheduler: belongs to the run configuration: set optim.schedule and "
            "optim.warmup_steps there (ds.json)", ds={"scheduler": {"type": "WarmupLR"}}),
    Mistake("DeepSpeed JSON", "a whole batch", "train_batch_size: is derived: micro-batch x "
            "gradient_accumulation_steps x ranks. Remove it (ds.json)", ds={"train_batch_size": 8}),
    Mistake("DeepSpeed JSON", "a value left to another framework", "gradient_clipping: is \"auto\", which nothing here "
            "fills in: write the value (ds.json)", ds={"gradient_clipping": "auto"}),
    Mistake("DeepSpeed JSON", "a value of the wrong type", "zero_optimization.stage: must be of type int, not \"2\" "
            "(ds.json)", ds={"zero_optimization": {"stage": "2"}}),
    Mistake("DeepSpeed JSON", "no micro-batch", "train_micro_batch_size_per_gpu: must be given, and positive: the "
            "packed rows of a rank in one pass (ds.json)", ds={"train_micro_batch_size_per_gpu": 0}),
    Mistake("DeepSpeed JSON", "a ZeRO stage that does not exist", "zero_optimization.stage: must be 1, 2 or 3, not 4 "
            "(ds.json)", ds={"zero_optimization": {"stage": 4}}),
    Mistake("DeepSpeed JSON", "bf16 and fp16 at once", "fp16: and bf16 are both enabled: keep bf16 (ds.json)",
            ds={"bf16": {"enabled": True}, "fp16": {"enabled": True}}),
    Mistake("DeepSpeed JSON", "gradients that are not looked at", "bf16.check_grad_overflow: is false, but steps with "
            "bad gradients are skipped through it: remove it (ds.json)",
            ds={"bf16": {"enabled": True, "check_grad_overflow": False}}),
    Mistake("DeepSpeed JSON", "offload in stage 3", "zero_optimization.offload_optimizer: is not supported in ZeRO "
            "stage 3 with experts; use stage 2, as in ds_configs/zero2_offload.json (ds.json)",
            ds={"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
    Mistake("DeepSpeed JSON", "fp16 on a CPU", "fp16: cannot train on a CPU: enable bf16 instead, or neither for fp32 "
            "(ds.json)", ds={"fp16": {"enabled": True}}, ranks=BOTH),
    Mistake("DeepSpeed JSON", "offload on a CPU", "zero_optimization.offload_optimizer: has no use on a CPU, where the "
            "state is in host memory already: remove it (ds.json)",
            ds={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    # ---- kernels
    Mistake("Kernels", "an attention backend that cannot run here", "model.attention.backend: 'torch_flash' cannot run "
            "here: FlashAttention-2 has no kernels for a cpu device. Use auto, which would "
            "pick 'cpu_band'", set=("model.attention.backend=torch_flash",), ranks=BOTH),
    Mistake("Kernels", "an attention backend that does not exist", "model.attention.backend: 'triton' is not a "
            "backend; choose auto, flash_attn, torch_flash, cpu_band, reference",
            set=("model.attention.backend=triton",)),
    Mistake("Kernels", "an expert backend of GPUs on a CPU", "model.moe.backend: 'megablocks' cannot run here: the "
            "model is on cpu, …. Use model.moe.backend = auto, which would choose 'cpu'",
            set=("model.moe.backend=megablocks",)),
    Mistake("Kernels", "an expert backend that cannot take the widths", "model.moe.backend: 'grouped_mm' cannot run "
            "here: model.moe.ffn or model.moe.shared_ffn = 33 must be a multiple of 4 for torch.float32. Use "
            "model.moe.backend = auto, which would choose 'cpu'",
            set=("model.moe.backend=grouped_mm", "model.moe.ffn=33")),
    # ---- data
    Mistake("Data", "a file that is missing", "data.train: none.jsonl: no such file or folder", 81,
            set=("data.train=none.jsonl",), ranks=BOTH),
    Mistake("Data", "documents of one's own beside the bundled ones", "data.valid: still names the bundled documents, "
            "but data.train names others: name yours, or set data.valid= for none",
            set=("data.valid=data/proposals/valid.jsonl.gz",)),
    Mistake("Data", "a file in a list that is missing", "data.train: none.jsonl: no such file or folder", 81,
            set=('data.train=["train.jsonl", "none.jsonl"]',)),
    Mistake("Data", "a named corpus that is missing", "data.train.a.documents: none.jsonl: no such file or folder", 81,
            set=('data.train={a={documents="none.jsonl"}}',)),
    Mistake("Data", "a folder without documents", "data.train: empty has no files (.jsonl, .json, .jsonl.gz, .json.gz, "
            ".parquet)", 81, set=("data.train=empty",), files={"empty/readme.txt": ""}),
    Mistake("Data", "a file of another form", "train.csv: is not of a form that is read (.jsonl, …): write JSON lines, "
            "one object a line", 81, set=("data.train=train.csv",), files={"train.csv": "src,trg\na,b\n"}),
    Mistake("Data", "an empty file", "train.jsonl: is empty", 81, files={"train.jsonl": ""}),
    Mistake("Data", "a file of blank lines", "train.jsonl: is empty", 81, files={"train.jsonl": "\n\n"}),
    Mistake("Data", "a broken line", "train.jsonl:2: is not valid JSON: … (column 8)", 81,
            files={"train.jsonl": GOOD + '{"src": \n' + GOOD}, ranks=BOTH),
    Mistake("Data", "a line that is no object", "train.jsonl:1: must be a JSON object, not a number", 81,
            files={"train.jsonl": "7\n"}),
    Mistake("Data", "a field that is missing", 'train.jsonl:2: needs fields "src" and "trg", or "text"; it has src. '
            "Name its fields by data.source_field and data.target_field, or data.text_field", 81,
            files={"train.jsonl": GOOD + '{"src": "bad"}\n'}),
    Mistake("Data", "none of the fields", 'train.jsonl:1: needs fields "src" and "trg", or "text"; it has body, title. '
            "Name its fields by data.source_field and data.target_field, or data.text_field", 81,
            files={"train.jsonl": '{"title": "a", "body": "b"}\n'}),
    Mistake("Data", "a field of the wrong type", 'train.jsonl:2: field "trg" must be a string, not a number', 81,
            files={"train.jsonl": GOOD + '{"src": "bad", "trg": 3}\n'}),
    Mistake("Data", "text that is not UTF-8", "train.jsonl:1: is not UTF-8", 81,
            files={"train.jsonl": b'{"src": "\xff", "trg": "a"}\n'}),
    Mistake("Data", "a damaged gzip file", "train.jsonl.gz: is damaged: …", 81, set=("data.train=train.jsonl.gz",),
            files={"train.jsonl.gz": b"\x1f\x8b\x08\x00 not gzip"}),
    Mistake("Data", "a validation file with a broken line", "valid.jsonl:1: is not valid JSON: … (column 1)", 81,
            files={"valid.jsonl": "broken\n"}),
    Mistake("Data", "documents without any text", "data.train: the documents hold no text to train a vocabulary on", 81,
            files={"train.jsonl": '{"src": "", "trg": ""}\n'}),
    Mistake("Data", "too little text for the vocabulary", "data.vocab_size = 5000: no vocabulary of this size can be "
            "trained on … lines of text: …", 81, set=("data.vocab_size=5000",)),
    Mistake("Data", "a vocabulary that is missing", "none.model: the vocabulary cannot be read: No such file or "
            "directory", 81, set=("data.vocabulary=none.model",)),
    Mistake("Data", "a vocabulary of another kind", "my.model: is not a sentencepiece model", 81,
            set=("data.vocabulary=my.model",), files={"my.model": "words"}),
    Mistake("Data", "a prepared folder without the split", "data.train: made has no whole train split: make it with "
            "tools/prepare_data.py, or name another", 81, set=("data.train=made",),
            files={"made/settings.json": "{}", "made/data.toml": ""}),
    Mistake("Data", "a cache folder that cannot be written", "data.cache_dir: taken cannot be written: File exists. "
            "Make room, or give another folder", 80,
            set=("data.cache_dir=taken",), files={"taken": ""}, ranks=BOTH),
    Mistake("Data", "no disk space for the cache", "data.cache_dir: small cannot be written: No space left on device. "
            "Make room, or give another folder", 80, set=("data.cache_dir=small",), disk="small", disk_kb=20),
    # ---- run folder
    Mistake("Run folder", "a file in its place", "--run_dir: …/taken cannot be written: …", files={"taken": ""},
            arguments=("--run_dir", "taken"), ranks=BOTH),
    Mistake("Run folder", "a place where nobody can write", "--run_dir: /proc/run cannot be written: …",
            arguments=("--run_dir", "/proc/run")),
    Mistake("Run folder", "no disk space at the start", "--run_dir: …/run cannot be written: No space left on device…",
            arguments=("--run_dir", "small/run"), disk="small", disk_kb=8, ranks=BOTH),
    Mistake("Run folder", "the folder of another configuration", "--run_dir: …/run belongs to another configuration "
            "(optim.lr was 0.003, is 0.5): choose another --run_dir, or start as before", set=("optim.lr=0.5",),
            resumes=True, ranks=BOTH),
    Mistake("Run folder", "a folder that another run uses", "--run_dir: …/run is in use by another process: wait for "
            "it, end it or choose another --run_dir", resumes=True, held=True),
    Mistake("Run folder", "a new start where there are checkpoints", "--resume: is none, but …/run holds checkpoints: "
            "choose another --run_dir, or auto to continue", arguments=("--resume", "none"), resumes=True),
    # ---- checkpoints
    Mistake("Checkpoints", "another ZeRO stage", "…/step-00000002 was saved with zero_stage = 2, this run has "
            "zero_stage = 1: start it as it was saved, or convert it: python …convert_checkpoint.py "
            "…/step-00000002 TO --format checkpoint --world … --expert_parallel_size 1 --zero_stage 1", 84,
            ds={"zero_optimization": {"stage": 1}}, resumes=True),
    Mistake("Checkpoints", "another number of ranks, and of rows in a step", "…/step-00000002 was saved with world = "
            "1, rows_per_step = 1, this run has world = 2, rows_per_step = 2: choose micro-batch and accumulation so "
            "that rows_per_step, their product with the ranks, is 1 again, or begin a new run from the exported model "
            "with --init_from", 84, resumes=True, saved_by=1, ranks=(2,)),
    Mistake("Checkpoints", "a checkpoint that is not there", "…/none has no readable manifest.json (…): it was never "
            "completed", 84, arguments=("--resume", "none/none")),
    Mistake("Checkpoints", "a checkpoint with a broken manifest", "…/step-00000002 has no readable manifest.json (…): "
            "it was never completed", 84, arguments=("--resume", "run/checkpoints/step-00000002"), resumes=True,
            files={"run/checkpoints/step-00000002/manifest.json": "{"}, ranks=BOTH),
    Mistake("Checkpoints", "a checkpoint of another model", "…/step-00000002 holds the weights of another model "
            "(model.width was 32, is 64): start it as it was saved, or begin a new run without --resume", 84,
            arguments=("--resume", "run/checkpoints/step-00000002", "--run_dir", "new"), set=("model.width=64",),
            resumes=True),
    Mistake("Checkpoints", "a start from a folder without a model", "empty/model.safetensors cannot be read: …", 84,
            arguments=("--init_from", "empty"), files={"empty/readme.txt": ""}),
    Mistake("Checkpoints", "a start from a model in another vocabulary", "run/model was trained with another "
            "vocabulary than …, whose ids mean other tokens: set data.vocabulary = run/model/vocabulary.model", 84,
            arguments=("--init_from", "run", "--run_dir", "new"), resumes=True,
            files={"train.jsonl": OTHER}),
    Mistake("Checkpoints", "a start from a model of another shape", "run/model/model.safetensors does not fit this "
            "model: …", 84, arguments=("--init_from", "run", "--run_dir", "new"), set=("model.width=64",),
            resumes=True),
    Mistake("Checkpoints", "no disk space for a checkpoint", "…/small/run cannot be written: … Make room and "
            "start again: the newest whole checkpoint is kept", 84, arguments=("--run_dir", "small/run"), disk="small",
            ranks=BOTH),
    Mistake("Checkpoints", "no disk space while training", "…/run cannot be written: No space left on device. Make "
            "room and start again: the newest whole checkpoint is kept", 84,
            links={"run/metrics.tmp": "/dev/full"}),
    # ---- while training
    Mistake("While training", "a learning rate that is far too high", "step …: 3 steps in a row were skipped "
            "(train.max_skipped); metrics.jsonl says why, as events. Continue with another configuration, such as a "
            "lower optim.lr: in a new --run_dir, with --resume and a checkpoint's folder", 82,
            set=("optim.lr=1e30", "train.steps=9", "train.max_skipped=3"), ranks=BOTH),
    Mistake("While training", "a model larger than the memory", "out of memory (…): lower "
            "train_micro_batch_size_per_gpu, raising gradient_accumulation_steps instead, lower data.row_tokens or the "
            "sizes of the model, or set train.activation_checkpointing", 83,
            set=("model.moe.ffn=100000000000",)),
    # ---- no mistake, but said
    Mistake("Said, not refused", "sources and targets longer than the limits", "training documents: …; cut: 50.0 % of "
            "sources to their limit, 0.0 % to the row, 50.0 % of targets", 0,
            files={"train.jsonl": _documents(20, 2, 1) + _documents(20, 90, 40)}),
    Mistake("Said, not refused", "ZeRO stage 0", "ds.json: zero_optimization.stage 0 -> 1: …", 0,
            ds={"zero_optimization": {"stage": 0}}),
    Mistake("Said, not refused", "experts that hardly get a token", "step …: warning: expert … got less than 10% of an "
            "equal share of the tokens over the last 10 lines of metrics and hardly learn: raise "
            "model.moe.balance_weight, or lower model.moe.experts", 0,
            set=("train.steps=10", "optim.lr=0.1", "model.moe.experts=32", "model.moe.top_k=1",
                 "model.moe.balance_weight=0.0")),
    Mistake("Said, not refused", "a loss that is not finite, once", "step 2: skipped, the loss is not finite (rank…", 0,
            set=("optim.lr=1e30", "optim.warmup_steps=0", "train.steps=2")),
    Mistake("Said, not refused", "a damaged checkpoint", "passing over a damaged checkpoint: …/step-00000002 has no "
            "readable manifest.json (…): it was never completed", 0, resumes=True,
            files={"run/checkpoints/step-00000002/manifest.json": "{"}),
    Mistake("Said, not refused", "a resumed run with another length", "resuming with train.steps = 3 (was 2)", 0,
            set=("train.steps=3",), resumes=True),
]

_PAGE = """\
# Errors

Every mistake ends a run with one line, `error: ` and what stands below, said by one rank, and with an exit code
([configuration.md](configuration.md#exit-codes)). `…` stands for what depends on the case. Each line is tested
on one and on two ranks (`tests/mistakes/test_bad_input.py`); this page is written by
`python tests/mistakes/mistakes.py > docs/errors.md`.
"""


def page() -> str:
    """docs/errors.md."""
    parts = [_PAGE]
    for stage, group in groupby(MISTAKES, key=lambda mistake: mistake.stage):
        parts.append(f"## {stage}\n\n| what is wrong | what is said | exit code |\n| --- | --- | ---: |\n" + "".join(
            f"| {mistake.what} | `{mistake.says}` | {mistake.code} |\n" for mistake in group))
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
