"""The likelihoods of given answers, and the grammar that holds an answer to them. All on token ids: a text may be
spelled in several ways, of which training knows one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

Ids = tuple[int, ...]

MAX_STEPS = 256  # tokens that are scored for a question
STEPS_AT_ONCE = 8


def steps_of(choices: Mapping[str, Ids]) -> list[Ids]:
    """What must be scored: each beginning of a choice once, shorter ones first; its last token is the scored one."""
    found = {ids[: end + 1] for ids in choices.values() for end in range(len(ids))}
    return sorted(found, key=lambda ids: (len(ids), ids))


async def logprobs_of(choices: Mapping[str, Ids], score: Callable[[Ids, int], Awaitable[float]]) -> dict[str, float]:
    """log p(tokens | prompt) of each choice, the sum over its tokens.

    Args:
        choices: text -> its tokens.
        score: (tokens behind the prompt, a token) -> the log-probability of that token behind them. It is called for
            STEPS_AT_ONCE tokens at a time.
    """
    free = asyncio.Semaphore(STEPS_AT_ONCE)

    async def scored(step: Ids) -> float:
        async with free:
            return await score(step[:-1], step[-1])

    steps = steps_of(choices)
    tasks = [asyncio.ensure_future(scored(step)) for step in steps]
    try:
        by_step = dict(zip(steps, await asyncio.gather(*tasks)))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {text: sum(by_step[ids[: end + 1]] for end in range(len(ids))) for text, ids in choices.items()}


def grammar_of(choices: Mapping[str, Ids]) -> str:
    """The choices in xgrammar's EBNF."""
    return "root ::= " + " | ".join(" ".join(f"Token({id_})" for id_ in ids) for ids in choices.values())
