"""The first process of a job: load the pod's environment from its private folder, then become the entrypoint.

`python -m finetune_local.pod_exec <folder> <job>` is all that Ray sees, stores and shows; Secrets are only in the
folder (mode 0700) and in the job's own environment. Standard library only: it is on the way of every job.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(folder: str, job: str) -> None:
    base = Path(folder)
    environment = json.loads((base / "environment.json").read_text())
    launch = json.loads((base / f"{job}.launch.json").read_text())
    # Ray forbids threads to a worker that asks for no CPU; a container would have all of its CPUs.
    os.environ.pop("OMP_NUM_THREADS", None)
    # What the submission itself sets (runtime_env) wins over the pod, as it does in a real one.
    os.environ.update({name: value for name, value in environment.items() if name not in launch["keep"]})
    if not launch["has_working_dir"]:
        os.chdir(base / "work")
    sys.stdout.flush()
    os.execv("/bin/sh", ["sh", "-c", launch["entrypoint"]])  # noqa: S606 - becoming it is the point


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
