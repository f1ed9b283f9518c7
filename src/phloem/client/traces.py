"""What the engine did for a continuation, as spans below the span of its request."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation

NAME = "llm_request"
CHUNK = "prefill_chunk"  # of what the engine did: it lies below the whole of its prompt


def tell(output: Continuation, reason: str) -> None:
    """`reason`: how it ended. Names of attributes are those of OpenTelemetry's conventions for generative models."""
    if output.trace is None:
        return
    start, end = output.arrival, output.last_at or time.monotonic()
    begun = start + output.queue_seconds
    params = output.params
    facts: dict[str, Any] = {
        "gen_ai.request.id": output.id,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.input_tokens": output.prompt_tokens,
        "gen_ai.usage.output_tokens": len(output.ids),
        "gen_ai.response.finish_reasons": [reason],
        "gen_ai.latency.time_in_queue": output.queue_seconds,
        "gen_ai.latency.e2e": end - start,
        "phloem.cached_tokens": output.cached_tokens,
    }
    if params.max_new_tokens is not None:
        facts["gen_ai.request.max_tokens"] = params.max_new_tokens
    if output.first_at:
        facts["gen_ai.latency.time_to_first_token"] = output.first_at - start
    whole = output.trace.child(NAME, start, end, facts)
    whole.child("queue", start, begun, {})
    for name, since, until, count in output.did:
        if name != CHUNK:
            whole.child(name, since, until, {"phloem.bytes": count} if count else {})
    if output.first_at:
        computed = {"phloem.tokens": output.prompt_tokens - output.cached_tokens}
        prefill = whole.child("prefill", begun, output.first_at, computed)
        for name, since, until, count in output.did:
            if name == CHUNK:
                prefill.child(name, since, until, {"phloem.tokens": count})
        whole.child("decode", output.first_at, end, {"phloem.tokens": len(output.ids)})
