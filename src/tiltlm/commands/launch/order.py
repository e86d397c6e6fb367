"""A run as an order that another process carries out, here or on another machine that sees the same files.

An order holds the recipe's settings whole, as the folder's config.json does not: that has lost the credentials that a
reward's URL may hold. So orders are handed on where no other user looks: by standard input, the environment, a socket.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiltlm.commands.options import from_json
from tiltlm.commands.process import prepare
from tiltlm.mistakes import MISTAKES, one_line
from tiltlm.models.scattered import in_parts, is_said
from tiltlm.recipes import recipe
from tiltlm.rewards.masking import mask
from tiltlm.run import Recipe, Run, ensure, find
from tiltlm.stopping import Stopped, listening


@dataclass(frozen=True)
class Order:
    """What is to be built.

    recipe     its name
    settings   its settings, as JSON
    folder     the run's folder
    command    what the user typed, for provenance.json
    cwd        where relative paths begin
    shard      whether several processes hold networks in parts
    """

    recipe: str
    settings: str
    folder: str
    command: str
    cwd: str
    shard: bool = False

    @staticmethod
    def of(run: Run[Any], command: str) -> Order:
        settings = json.dumps(asdict(run.recipe), default=str)
        return Order(run.recipe.name, settings, str(run.folder), command, os.getcwd(), is_said())

    @property
    def secret(self) -> bool:
        """Whether its settings hold credentials."""
        return mask(self.settings) != self.settings

    def carry_out(self) -> int:
        """Build the run; the exit status: 0 done, 2 a mistake (said on standard error), 128 + a signal."""
        prepare()
        os.chdir(self.cwd)
        settings = json.loads(self.settings)
        value: Recipe = from_json(recipe(self.recipe, settings.get("methods")), settings)
        folder = Path(self.folder)
        try:
            if find(value, folder.parents[2]).folder != folder:
                raise ValueError(f"{folder}: the files that its settings name have changed since it was begun")
            with listening(), in_parts(self.shard):
                ensure(value, folder.parents[2], self.command)
        except Stopped as stopped:
            return stopped.status
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except MISTAKES as error:
            print(f"{value.name}: {mask(one_line(error))}", file=sys.stderr)
            return 2
        return 0


if __name__ == "__main__":
    sys.exit(Order(**json.load(sys.stdin)).carry_out())
