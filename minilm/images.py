"""Images for vision teachers, from folders, parquet files or the hub, as pixel values and a held-out part.

Only the files' names or bytes are indexed; an image is decoded and put through the teacher's processor when it is read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torch import Tensor

from minilm.data import load_files, load_train_split, split_heldout, training_files


def load_images(
    sources: Sequence[str], processor: Any, *, config: str | None = None, image_column: str = "image"
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training, held-out) images, one in twenty held out and at most 512, with "pixel_values" made when they are read.

    Args:
        sources: each a folder of images, a .parquet file with a column of them, or a data set's name on the hub.
        processor: the teacher's image processor, as `AutoImageProcessor` loads it.
        config: the configuration of a hub name.
        image_column: where the image stands; a folder of images needs none.

    Raises:
        ValueError: nothing there, another kind of file, no such column, or no image in it.
        ModuleNotFoundError: Pillow is not installed.
    """
    if not datasets.config.PIL_AVAILABLE:
        raise ModuleNotFoundError("images are decoded by Pillow, which is not installed: pip install pillow")
    parts = [_images_of(source, _open(source, config), image_column) for source in sources]
    train, heldout = split_heldout(datasets.concatenate_datasets(parts))
    transform = PixelValues(processor)
    return train.with_transform(transform), heldout.with_transform(transform)


class PixelValues:
    """The transform of a data set of images: rows of "image" -> rows of "pixel_values", each (C, H, W)."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        images = (image.convert("RGB") for image in rows["image"])  # grey ones and palettes too
        return {"pixel_values": [self.processor(image, return_tensors="pt")["pixel_values"][0] for image in images]}


def stack_images(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Collates images into {"pixel_values": (B, C, H, W)}.

    Raises:
        ValueError: images of several shapes.
    """
    shapes = sorted({tuple(row["pixel_values"].shape) for row in rows})
    if len(shapes) > 1:
        raise ValueError(
            f"images of shapes {shapes[0]} and {shapes[1]} make no batch: the processor must resize or crop to one size"
        )
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def _open(source: str, config: str | None) -> datasets.Dataset:
    path = Path(source)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(
                f"cannot read {source!r}: images come from a folder or a .parquet file, not {path.suffix!r}"
            )
        return load_files(source, [path])
    if path.is_dir():
        suffixes = (file.suffix.lower() for file in path.rglob("*"))
        first = next((suffix for suffix in suffixes if suffix == ".parquet" or suffix in ImageFolder.EXTENSIONS), None)
        if first is None:
            raise ValueError(f"the folder {source!r} holds no image and no .parquet file")
        if first == ".parquet":
            return load_files(source, training_files(path, ".parquet"))
        return load_train_split(source, "imagefolder", data_dir=source, drop_labels=True)
    if path.suffix == ".parquet" or path.is_absolute() or source.startswith("."):
        raise ValueError(f"there is no file or folder {source!r}")
    return load_train_split(source, source, name=config)


def _images_of(source: str, rows: datasets.Dataset, column: str) -> datasets.Dataset:
    if column not in rows.column_names:
        raise ValueError(f"{source!r} has no column {column!r}; choose with --image_column from {rows.column_names}")
    if not isinstance(rows.features[column], datasets.Image):
        raise ValueError(f"the column {column!r} of {source!r} holds {rows.features[column]}, not images")
    return rows.select_columns([column]).rename_columns({column: "image"})
