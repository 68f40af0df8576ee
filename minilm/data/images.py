"""Images for vision teachers, from folders, parquet files or the hub, as pixel values and a held-out part.

Only the files' names or bytes are indexed; an image is decoded and put through the teacher's processor when it is read.
"""

import glob
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torch import Tensor

from minilm.data.cache import load_train_split
from minilm.data.faults import DataError, faults_at
from minilm.data.files import Chosen, training_files, walk
from minilm.data.texts import Found, split_heldout
from minilm.errors import UsageError


def load_images(
    sources: Sequence[str],
    processor: Any,
    *,
    config: str | None = None,
    image_column: str = "image",
    found: Found | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training, held-out) images, one in twenty held out and at most 512, with "pixel_values" made when they are read.

    Args:
        sources: each a folder of images or of .parquet files (of its training split, as `minilm.data.files` has it), a
            .parquet file with a column of images, or a data set's name on the hub.
        processor: the teacher's image processor, as `AutoImageProcessor` loads it.
        config: the configuration of a hub name.
        image_column: where the image stands; a folder of images needs none.
        found: what `find_images` has found of each source, to list no folder twice.

    Raises:
        ValueError: nothing there, another kind of file, no such column, or no image in it.
        ModuleNotFoundError: Pillow is not installed.
    """
    if not datasets.config.PIL_AVAILABLE:
        raise ModuleNotFoundError("images are decoded by Pillow, which is not installed: pip install pillow")
    found = {source: find_images(source) for source in sources} if found is None else found
    parts = [_images_of(source, *_open(source, found[source], config, image_column)) for source in sources]
    train, heldout = split_heldout(datasets.concatenate_datasets(parts))
    transform = PixelValues(processor)
    return train.with_transform(transform), heldout.with_transform(transform)


class PixelValues:
    """The transform of a data set of images: rows of "image", encoded -> rows of "pixel_values", each (C, H, W).

    Raises:
        DataError: an image that cannot be decoded.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        images = (_decode(image) for image in rows["image"])
        return {"pixel_values": [self.processor(image, return_tensors="pt")["pixel_values"][0] for image in images]}


def stack_images(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Collates images into {"pixel_values": (B, C, H, W)}.

    Raises:
        ValueError: images of several shapes.
    """
    shapes = sorted({tuple(row["pixel_values"].shape) for row in rows})
    if len(shapes) > 1:
        raise UsageError(
            f"images of shapes {shapes[0]} and {shapes[1]} make no batch: the processor must resize or crop to one size"
        )
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def _decode(image: Mapping[str, Any]) -> Any:
    from PIL import Image  # an extra of its own

    path, content = image["path"], image["bytes"]
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as opened:
            return opened.convert("RGB")  # grey ones and palettes too
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = f"{getattr(error, 'strerror', None) or error}"
        raise DataError(f"cannot read the image {path!r}: {' '.join(reason.split())}") from error


def find_images(source: str) -> Chosen | None:
    """The files of a source of images that are read; None of a name on the hub. Errors as `load_images`."""
    path = Path(source)
    if not source:
        raise UsageError("the name of the data is empty: --data takes folders, .parquet files or names on the hub")
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise UsageError(
                f"cannot read {source!r}: images come from a folder or a .parquet file, not {path.suffix!r}"
            )
        return Chosen([path], [])
    if path.is_dir():
        try:
            files = walk(path)
        except OSError as error:
            raise UsageError(f"cannot list the folder {str(error.filename)!r}: {error.strerror}") from error
        found = {
            ".parquet": [file for file in files if file.suffix.lower() == ".parquet"],
            "images": [file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS],
        }
        kinds = {kind: training_files(path, some) for kind, some in found.items() if some}
        if not kinds:
            raise UsageError(f"the folder {source!r} holds no image and no .parquet file")
        if len(kinds) > 1:
            one, other = (some[0].relative_to(path).as_posix() for some in kinds.values())
            raise UsageError(
                f"the folder {source!r} holds {one} and {other}: name the .parquet files or the images' folder"
            )
        (chosen,) = kinds.values()
        rest = set(files) - set(chosen)
        return Chosen(chosen, [file.relative_to(path).as_posix() for file in files if file in rest])
    if path.suffix == ".parquet" or path.is_absolute() or source.startswith("."):
        raise UsageError(f"there is no file or folder {source!r}")
    return None


def _open(source: str, chosen: Chosen | None, config: str | None, column: str) -> tuple[datasets.Dataset, str]:
    """The rows, and in which column the images stand."""
    if chosen is None:
        return load_train_split(source, source, name=config), column
    if chosen.files[0].suffix.lower() != ".parquet":
        names = [str(file) for file in chosen.files]
        return datasets.Dataset.from_dict({"image": names}).cast_column("image", datasets.Image()), "image"
    parts = []
    for file in chosen.files:
        with faults_at(partial(repr, str(file))):
            schema, rows = pq.read_schema(file), pq.read_metadata(file).num_rows
        if column not in schema.names:
            raise UsageError(
                f"{str(file)!r} has no column {column!r}; choose with --image_column from {list(schema.names)}"
            )
        if rows:
            options = {"data_files": glob.escape(str(file)), "columns": [column]}
            parts.append(load_train_split(str(file), "parquet", **options))
    if not parts:
        raise UsageError(f"{source!r} holds no image: its files have no rows")
    return datasets.concatenate_datasets(parts), column


def _images_of(source: str, rows: datasets.Dataset, column: str) -> datasets.Dataset:
    if column not in rows.column_names:
        raise UsageError(f"{source!r} has no column {column!r}; choose with --image_column from {rows.column_names}")
    if not isinstance(rows.features[column], datasets.Image):
        raise UsageError(f"the column {column!r} of {source!r} holds {rows.features[column]}, not images")
    rows = rows.select_columns([column]).rename_columns({column: "image"})
    return rows.cast_column("image", datasets.Image(decode=False))  # `PixelValues` decodes, and names what is broken
