"""Where the data of a run come from."""

from pathlib import Path

from hf_engram.hub import DataSource


def dataset_source(name: str, config: str | None, license: str | None) -> DataSource:
    """A data set as the model card names it: by its id where it is on the Hub, else by its folder's name."""
    on_the_hub = not Path(name).is_dir()
    return DataSource(
        name=name if on_the_hub else Path(name).name,
        license=license,
        hub_id=name if on_the_hub else None,
        config=config,
    )
