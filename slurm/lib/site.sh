# shellcheck shell=bash
# What differs between clusters, and the Python of all nodes. Read in the root of the repository.
if [ -f slurm/site.env ]; then
    # shellcheck source=slurm/site.env.example
    . slurm/site.env
fi
# shellcheck disable=SC2034 # for the script that reads this
python=${PYTHON:-$PWD/.venv/bin/python}
