"""The library from Python: learn, measure, compare, report. The command line does the same on disk.

>>> import tiltlm as tl
>>> task = tl.Problem.of("gpt2", reward=lambda prompts, completions: [float("dog" in y) for y in completions],
...                      prompts=["I bought this"], beta=0.5, max_new_tokens=24)        # doctest: +SKIP
>>> guided = tl.learn(task, tl.CTL(), steps=200)                                       # doctest: +SKIP
>>> tl.measure(task, {"reference": task.reference, "guided": guided, "best of 8": tl.BestOf(8)})    # doctest: +SKIP
"""
