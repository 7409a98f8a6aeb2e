"""Commands in processes of their own that cost no imports.

They are forked from a process that has imported what most commands need and done nothing else: not
huggingface_hub, which reads its settings once. What a command does when it starts (its imports, an
interpreter's options) needs `subprocess` and `python -m moeforge`.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

# test_ranks runs a function of its own in them.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "moeforge.cli", "moeforge.forge", "moeforge.engine.evaluate", "test_ranks"]
)


def moeforge(*words, cwd=None, env=None, timeout=120):
    """Run a command; return its exit code and what it said, as `subprocess.run` does."""
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        where = str(cwd or Path.cwd())
        given = (words, where, dict(os.environ if env is None else env), *map(str, said))
        process = FORKS.Process(target=_command, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"moeforge {' '.join(words)}: {said[1].read_text()}")
        return CompletedProcess(words, process.exitcode, *(file.read_text() for file in said))


def _command(words, where, env, *said):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(where)
    for number, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    from moeforge.cli import main

    sys.argv = ["moeforge", *words]
    main()
