"""A served judge under load: scores per second, and how long the slowest wait, while requests teach it.

    python bench/judge_service.py [--quick]

The judge is a random-weight GPT-2 of 4 layers × 128 under a fresh head, with `tiltlm serve` in a process of its own. One
client teaches it without a pause (32 completions a request, 2 of their 16 pairs bought, 4 passes once 16 are); 1, 8 or 32
others ask for the scores of 8 completions each, over and over. Printed for every number of clients: requests per second,
the median, the 99th percentile and the longest of their times, requests that taught, and how often the judge was trained.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
from transformers import GPT2Config

from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.judges.client import RemoteJudge
from tiltlm.models.causal import CausalLM
from tiltlm.seeds import stream

CLIENTS = (1, 8, 32)
GOLD = "def es(prompts, completions):\n    return [y.count('e') for y in completions]\n"


def rows(step: int, n: int) -> tuple[list[str], list[str]]:
    """n completions of n / 2 prompts."""
    return [f"Story {k // 2}:" for k in range(n)], [" " + text[:160] for text in stories(n, stream(step, "bench"))]


def prepare(folder: Path) -> None:
    """A language model with a tokenizer, and a gold reward."""
    tokenizer = train_tokenizer(stories(200, stream(0, "bench")), 1000)
    size = {"vocab_size": len(tokenizer), "n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128}
    model = CausalLM.from_config(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    model.tokenizer = tokenizer
    model.save(folder / "body")
    (folder / "gold.py").write_text(GOLD)


def started(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """The server, and its address."""
    program = [
        sys.executable,
        "-m",
        "tiltlm.cli",
        "serve",
        "body",
        "--fresh",
        "--gold",
        "gold.py:es",
        "--port",
        "0",
    ]
    server = subprocess.Popen(program, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    first = server.stdout.readline()
    if " at http" not in first:
        raise SystemExit("the server did not start")
    return server, first.split()[-1]


class Load:
    """Clients that ask for scores, and one that teaches, for so many seconds."""

    def __init__(self, url: str, clients: int, seconds: float, first: int) -> None:
        self.url, self.clients, self.end, self.first = url, clients, time.monotonic() + seconds, first
        self.times: list[float] = []
        self.versions: set[int] = set()
        self.taught = 0

    def run(self) -> None:
        threads = [threading.Thread(target=self.score, args=(k,)) for k in range(self.clients)]
        for each in (teacher := threading.Thread(target=self.teach), *threads):
            each.start()
        for each in (*threads, teacher):
            each.join()

    def score(self, client: int) -> None:
        prompts, completions = rows(client, 8)
        with httpx2.Client(timeout=120) as http:
            while (begun := time.monotonic()) < self.end:
                answer = http.post(f"{self.url}/score", json={"prompts": prompts, "completions": completions})
                answer.raise_for_status()
                self.times.append(time.monotonic() - begun)
                self.versions.add(answer.json()["version"])

    def teach(self) -> None:
        judge = RemoteJudge(self.url)
        while time.monotonic() < self.end:
            judge.label(f"{self.first + self.taught}", *rows(self.first + self.taught, 32))
            self.taught += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 seconds for each number of clients instead of 30")
    seconds = 5.0 if parser.parse_args().quick else 30.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        server, url = started(folder)
        try:
            first = 0
            for clients in CLIENTS:
                load = Load(url, clients, seconds, first)
                load.run()
                first += load.taught
                ms = 1000 * np.array(load.times)
                print(
                    f"judge-service-{clients:<2d}  {len(ms) / seconds:6.1f} requests/s  median {np.median(ms):6.0f} ms  "
                    f"p99 {np.percentile(ms, 99):6.0f} ms  longest {ms.max():6.0f} ms  taught {load.taught}, "
                    f"versions {min(load.versions)} to {max(load.versions)}",
                    flush=True,
                )
        finally:
            server.terminate()
            server.communicate(timeout=60)


if __name__ == "__main__":
    main()
