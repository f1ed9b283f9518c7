DEFAULT_PROMPT_TEMPLATE: dict[str, str | int]
