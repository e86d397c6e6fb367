"""The command line: list | run | sweep | prepare | sample | doctor | merge | export | score | measure | compare | power |
report | serve | runs | calibrate | demo.

A recipe's options are its settings, derived from the recipe itself; nothing is declared twice. Results go to
standard output, progress to standard error. Mistakes by the user end in one line that says what to do, and
exit status 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper

from tiltlm import __version__, ranks
from tiltlm.mistakes import MISTAKES, one_line
from tiltlm.stopping import Stopped, listening

USAGE = """\
tiltlm: state pi* ∝ pi_ref · exp(r / beta), reach it by any road, measure in nats how close you came.

  tiltlm demo                                   the whole story on a laptop CPU: a table and a picture
  tiltlm list                                   tasks, methods and stages on two screens; --matrix: which go together
  tiltlm run   animals/ctl --task.beta 0.5      measure a method on a task (and build what that needs first)
  tiltlm run   animals/evaluate --methods ctl dpo rloo
                                                several methods against one target, side by side
  tiltlm sweep animals/ctl --seed 1,2,3 --task.beta 0.1,1
                                                run a grid: values separated by commas
  tiltlm prepare hh/train.jsonl --out pairs.jsonl
                                                preference data of many formats as plain rows, with a report
  tiltlm sample MODEL --prompts p.jsonl --n 4 --out y.jsonl
                                                draw completions from a model folder, hub name or run
  tiltlm doctor MODEL                           what a model is, how it may be run, what it needs
  tiltlm merge ADAPTERS --out FOLDER            adapters of a folder or run, merged into their model
  tiltlm export RUN --out FOLDER                a run's policy as a plain model with a card, ready to serve
  tiltlm score REWARD y.jsonl --out s.jsonl     add a reward to every completion
  tiltlm measure RUN… NAME=FOLDER…              finished runs, and models trained elsewhere, compared prompt by prompt
  tiltlm compare A B                            two runs, or files of scores, joined question by question
  tiltlm power --questions 1404                 which difference so many questions can show, before a run
  tiltlm report RUN… --out page.html            their tables, pictures and samples on one page, offline
  tiltlm serve JUDGE --gold NAME                a judge that learns from a trickle of gold verdicts, behind HTTP
  tiltlm runs ls                                what is in the runs folder; also diff A B, rm RUN…, du
  tiltlm calibrate                              how often the intervals hold, counted in worlds whose truth is known

Every command takes --help; `tiltlm run TASK/STAGE --help` shows the settings that people change first.
Runs live in ./runs (or $TILTLM_RUNS): the same command finds its run again, finished or half-way.
"""

COMMANDS = {"list": "list", "run": "run", "sweep": "run", "sample": "sample", "score": "score"}
COMMANDS |= {"prepare": "prepare", "measure": "measure", "report": "report", "calibrate": "calibrate"}
COMMANDS |= {"serve": "serve", "demo": "demo", "doctor": "doctor", "merge": "merge", "export": "export"}
COMMANDS |= {"compare": "compare", "power": "power", "runs": "runs"}
"""Each command, and the module of `commands/` that has the function of its name."""


SHARED = ("run", "sweep")
"""The commands that several processes, started by torchrun, do together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (0 fine, 1 a dry run that misses something, 2 the user's mistake, 130
    interrupted, 143 and 138 stopped by SIGTERM and SIGUSR1)."""
    args = list(sys.argv[1:] if argv is None else argv)
    _degrade_output()
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if args[0] == "--version":
        print(f"tiltlm {__version__}")
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        return _mistake(f"there is no command {command!r}." + (f" Did you mean {near[0]}?" if near else ""))
    if ranks.size() > 1 and command not in SHARED:
        return _mistake(f"`tiltlm {command}` is work for one process: start it without torchrun")
    try:
        with listening():
            status: int = vars(import_module(f"tiltlm.commands.{COMMANDS[command]}"))[command](rest)
        ranks.leave()
        return status
    except Stopped as stopped:
        print(f"\n{stopped}: the same command goes on where it stopped", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MISTAKES as error:
        if os.environ.get("TILTLM_TRACEBACK"):
            raise
        return _mistake(one_line(error))


def _degrade_output() -> None:
    """On a terminal that has not every character, print ? for those it lacks instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _mistake(text: str) -> int:
    from tiltlm.rewards.masking import mask  # a command that goes well does without

    who = f"tiltlm, process {ranks.number()}" if ranks.size() > 1 else "tiltlm"
    print(f"{who}: {mask(text)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
