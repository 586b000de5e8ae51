"""What the Hub checks in the metadata of a card."""

import re

import yaml

SPACE_COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
SPACE_SDKS = {"gradio", "docker", "static", "streamlit"}


def card_errors(content: str, repo_type: str) -> list[str]:
    """What the Hub refuses in a card's metadata, in part: no YAML, wrong types, an unfinished model-index or Space."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"YAML metadata error: {error}"]
    if not isinstance(metadata, dict):
        return ["YAML metadata is not a mapping"]
    errors = [
        f'"{name}" must be a string'
        for name in ("license", "library_name", "pipeline_tag", "title", "emoji", "app_file")
        if not isinstance(metadata.get(name, ""), str)
    ]
    for model in metadata.get("model-index", []):
        for result in model.get("results", []):
            complete = {"type", "name"} <= result.get("dataset", {}).keys() and "type" in result.get("task", {})
            if not complete or not all({"type", "value"} <= metric.keys() for metric in result.get("metrics", [{}])):
                errors.append('"model-index" has a result without task, dataset or metric')
        if "name" not in model:
            errors.append('"model-index[0].name" is required')
    if repo_type == "space":
        if metadata.get("sdk") not in SPACE_SDKS:
            errors.append(f'"sdk" must be one of {sorted(SPACE_SDKS)}')
        errors += [
            f'"{name}" must be one of {sorted(SPACE_COLOURS)}'
            for name in ("colorFrom", "colorTo")
            if metadata.get(name, "red") not in SPACE_COLOURS
        ]
    return errors
