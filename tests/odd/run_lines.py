"""Runs odd command lines, each in a process of its own with bounded time and memory: `run_lines.py FOLDER COUNT SEED`.

Prints a line of JSON per call: arguments, how it ended, seconds, and what it said last on stderr. What would take long
for good reasons (training, measuring, serving) ends as "reached" where it begins.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
SECONDS, MEMORY = 20.0, 2 << 30


class _Reached(BaseException):
    pass


def reached(*_: Any, **__: Any) -> None:
    raise _Reached


def prepared() -> Any:
    """The command line, with everything imported that it imports when needed, and its long ends cut off."""
    import manyheads.cli as cli
    import manyheads.compare.run as compare
    import manyheads.convert.sweep as convert
    import manyheads.explain.explanation as explanation
    import manyheads.explain.studies.running as studies
    import manyheads.heads.command as heads
    import manyheads.serve.command as serve
    import manyheads.shrink.run as shrink
    import manyheads.steer.run as steer

    for name in cli.VERBS:
        cli.verb(name)
    for verb in (compare, convert, shrink, studies):
        verb.run_anywhere = reached  # type: ignore[attr-defined]
    for slow in ("_retrieval", "_repeats", "_influence", "_gates"):
        setattr(heads.Study, slow, reached)
    serve._run = reached  # type: ignore[assignment]
    explanation._attributions = reached  # type: ignore[assignment]
    steer.answer = steer.cost = steer.bits_per_byte = reached  # type: ignore[assignment]
    return cli


def ended(cli: Any, arguments: list[str]) -> str | int:
    try:
        cli.main(arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except _Reached:
        return "reached"
    except BaseException:
        traceback.print_exc()
        return "escaped"
    return "unsaid"


def work(cli: Any, lines: list[list[str]], folder: Path) -> None:
    """In the child: an outcome after each line, as a line of its own in `folder/ended`."""
    told = (folder / "ended").open("w")
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    for arguments in lines:
        os.truncate(folder / "stderr", 0)
        begun = time.monotonic()
        end = ended(cli, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        said = (folder / "stderr").read_text(errors="replace").strip()
        found = {
            "arguments": arguments, "end": end, "seconds": time.monotonic() - begun,
            "lines": len(said.splitlines()), "said": said.rpartition("\n")[2], "more": said[-3000:],
        }  # fmt: skip
        told.write(json.dumps(found) + "\n")
        told.flush()
    os._exit(0)


def outcomes(cli: Any, lines: list[list[str]], folder: Path) -> Iterator[dict[str, Any]]:
    """Of each line. A process that dies or takes too long for one is followed by another for the rest."""
    while lines:
        (folder / "ended").write_text("")
        child = os.fork()
        if child == 0:
            work(cli, lines, folder)
        status, count, last = None, 0, time.monotonic()
        while status is None:
            done, found = os.waitpid(child, os.WNOHANG)
            status = found if done else None
            ready = (folder / "ended").read_text().count("\n")
            if ready > count:
                count, last = ready, time.monotonic()
            if status is None and time.monotonic() - last > SECONDS:
                os.kill(child, 9)
            time.sleep(0.05)
        yield from map(json.loads, (folder / "ended").read_text().splitlines())
        if count < len(lines):
            said = (folder / "stderr").read_text(errors="replace")[-3000:]
            code = os.waitstatus_to_exitcode(status)
            yield {
                "arguments": lines[count],
                "end": f"died {code}",
                "seconds": SECONDS,
                "lines": 0,
                "said": "",
                "more": said,
            }
        lines = lines[count + 1 :]


def main(folder: Path, count: int, seed: int) -> None:
    from command_lines import Lines
    from corners import corner
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # where it was imported before the environment said so
    os.chdir(folder)
    made = corner(folder / "files")
    cli = prepared()
    from manyheads.hosts.loading import load_any
    from manyheads.registry import list_attentions

    load_any(made["models"][0])
    list_attentions()
    for found in outcomes(cli, list(Lines(made, str(folder / "out"), seed).draw(count)), folder):
        print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
