"""Request body of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Any, ClassVar

from phloem.protocol import known
from phloem.protocol.body import Body, Later
from phloem.protocol.fields import HINT, NEEDS_FORMAT, Count, Int32, OpenAIBody


class ContentPart(Body, kw_only=True):
    """One part of a message's content: `text`, or a picture, video, sound or document (`protocol.media.MEDIA`)."""

    type: str
    text: str | None = None
    image_url: Any = None
    image: Any = None
    detail: Any = None
    uuid: Any = None
    video_url: Any = None
    audio_url: Any = None
    input_audio: Any = None
    video: Any = None
    audio: Any = None
    file: Any = None
    refusal: str | None = None
    cache_control: Any = None
    thinking: str | None = None
    name: str | None = None
    modalities: str | None = None

    ignored: ClassVar[dict[str, str]] = {
        "cache_control": HINT,
        "detail": "pictures are read at the size that the model was trained on",
        "uuid": "pictures are known by their content",
    }


class Message(Body, kw_only=True):
    """One message of a conversation, as clients send it or send back what they got."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: Any = None
    annotations: Any = None
    function_call: Any = None
    parsed: Any = None
    phase: str | None = None
    prefix: bool | None = None
    tools: list[dict[str, Any]] | None = None

    ignored: ClassVar[dict[str, str]] = {
        name: "part of answers that clients send back; templates do not read it"
        for name in ("refusal", "audio", "annotations", "parsed", "phase")
    }
    later: ClassVar[dict[str, Later]] = {
        "prefix": Later("prefix", (False,), "use continue_final_message to go on from the last message"),
        "tools": Later("tools_of_messages"),
    }


class ChatBody(OpenAIBody, kw_only=True):
    """`POST /v1/chat/completions`. `input_ids` stand for the rendered messages where both are sent."""

    pooled: ClassVar[bool | None] = False
    messages: list[Message] | None = None
    input_ids: list[Int32] | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    require_reasoning: bool | None = None
    max_thinking_tokens: Int32 | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    task: str | None = None
    return_meta_info: bool | None = None
    return_prompt_token_ids: bool | None = None
    return_input_ids_in_sglext: bool | None = None
    return_output_ids_in_sglext: bool | None = None
    return_sampling_mask: bool | None = None
    sampling_logprobs_mode: str | None = None
    return_flat_raw_output_top_logprobs: bool | None = None
    return_flat_raw_top_logprobs_b64: bool | None = None
    use_audio_in_video: bool | None = None
    video_config: dict[str, Any] | None = None
    max_dynamic_patch: Int32 | None = None
    min_dynamic_patch: Int32 | None = None

    ignored: ClassVar[dict[str, str]] = {
        **OpenAIBody.ignored,
        **known.MEDIA_IGNORED,
        "prediction": "a hint for speed; the answer is the same without",
        "verbosity": HINT,
    }
    later: ClassVar[dict[str, Later]] = {
        **OpenAIBody.later,
        "tools": Later("tools", ([],)),
        "tool_choice": Later("tools", ("none", "auto")),
        "functions": Later("tools", ([],)),
        "function_call": Later("tools", ("none", "auto")),
        "reasoning_effort": Later("reasoning", ("none",)),
        "separate_reasoning": Later("reasoning", (True,)),
        "stream_reasoning": Later("reasoning", (True,)),
        "require_reasoning": NEEDS_FORMAT,
        "modalities": Later("modalities", (["text"], [])),
        "audio": Later("audio"),
        "web_search_options": Later("web_search", ({},)),
        **known.CHAT_LATER,
    }

    def refuse_later(self, features: frozenset[str], where: str = "") -> None:
        super().refuse_later(features, where)
        for at, message in enumerate(self.messages or []):
            message.refuse_later(features, f"{where}messages[{at}].")
