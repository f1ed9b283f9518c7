from typing import Any

def get_peft_kwargs(
    rank_dict: dict[str, int], network_alpha_dict: dict[str, Any] | None, peft_state_dict: dict[str, Any]
) -> dict[str, Any]: ...
