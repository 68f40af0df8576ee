"""Images: every kind of source, what the processor makes of them, the held-out part, the collator, each clear error."""

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from tiny_models import tiny_model
from transformers import ViTImageProcessor

from minilm.data.faults import DataError
from minilm.data.images import load_images, stack_images

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def processor(**options: Any) -> Any:
    return ViTImageProcessor(**{"size": {"height": 16, "width": 16}, "do_normalize": False, **options})


def grey(level: int, size: tuple[int, int] = (20, 12)) -> Any:
    return Image.new("L", size, 4 * level)


def write_images(folder: Path, *levels: int) -> str:
    folder.mkdir(parents=True)
    for level in levels:
        grey(level).save(folder / f"{level:03}.png")
    return str(folder)


def write_parquet(path: Path, column: str, *levels: int) -> str:
    rows = datasets.Dataset.from_dict({column: [grey(level) for level in levels], "label": list(levels)})
    rows.cast_column(column, datasets.Image()).to_parquet(str(path))
    return str(path)


def levels(part: datasets.Dataset) -> list[int]:
    """The grey level of each image, from its pixel values in 0 .. 1."""
    found = []
    for row in part:
        assert row.keys() == {"pixel_values"}
        assert row["pixel_values"].shape == (3, 16, 16)
        assert row["pixel_values"].dtype == torch.float32
        found.append(round(255 * row["pixel_values"].mean().item()) // 4)
        assert row["pixel_values"].min() == row["pixel_values"].max()
    return found


def test_folders_and_parquet_files_give_pixel_values_and_a_heldout_part(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a", *range(20))
    (tmp_path / "a" / "notes.txt").write_text("no image", encoding="utf-8")
    parquet = write_parquet(tmp_path / "b.parquet", "image", *range(20, 41))
    train, heldout = load_images([folder, parquet], processor())
    assert len(heldout) == 2
    assert sorted(levels(train) + levels(heldout)) == list(range(41))
    assert levels(load_images([folder, parquet], processor())[1]) == levels(heldout)


def test_folders_of_classes_and_of_parquet_files_and_another_column(tmp_path: Path) -> None:
    write_images(tmp_path / "classes" / "cat", 1, 2)
    write_images(tmp_path / "classes" / "dog", 3)
    train, heldout = load_images([str(tmp_path / "classes")], processor())
    assert sorted(levels(train) + levels(heldout)) == [1, 2, 3]
    (tmp_path / "folder").mkdir()
    write_parquet(tmp_path / "folder" / "part.parquet", "picture", 4, 5)
    train, heldout = load_images([str(tmp_path / "folder")], processor(), image_column="picture")
    assert sorted(levels(train) + levels(heldout)) == [4, 5]


def test_a_batch_goes_through_a_loader_into_a_model(tmp_path: Path) -> None:
    train, _ = load_images([write_images(tmp_path / "a", *range(9))], processor())
    loader: Any = torch.utils.data.DataLoader(train, batch_size=4, collate_fn=stack_images)  # type: ignore[arg-type]
    batches = list(loader)
    assert [batch["pixel_values"].shape for batch in batches] == [(4, 3, 16, 16)] * 2
    assert torch.equal(batches[1]["pixel_values"][2], train[6]["pixel_values"])
    with torch.no_grad():
        assert tiny_model("vit")(**batches[0]).last_hidden_state.shape[0] == 4


def test_images_of_several_sizes_make_no_batch(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a", 1, 2)
    for name in ("large", "larger"):  # one of the four is held out: two sizes are left whichever it is
        grey(3, (30, 30)).save(tmp_path / "a" / f"{name}.png")
    train, heldout = load_images([folder], processor(do_resize=False))
    rows = [*train, *heldout]
    assert len(train[0:3]["pixel_values"]) == 3  # read together, whatever their sizes
    with pytest.raises(ValueError, match=r"shapes \(3, 12, 20\) and \(3, 30, 30\) make no batch"):
        stack_images(rows)


def test_errors_name_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(match: str, source: Path | str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            load_images([str(source)], processor(), **options)

    fails("there is no file or folder", tmp_path / "missing")
    fails(r"there is no file or folder 'missing\.parquet'", "missing.parquet")
    fails("cannot load the data 'no/such-name'", "no/such-name")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    fails(r"the folder '.*texts' holds no image and no \.parquet file", tmp_path / "texts")
    fails(r"from a folder or a \.parquet file, not '\.txt'", tmp_path / "texts" / "a.txt")
    parquet = write_parquet(tmp_path / "a.parquet", "picture", 1, 2)
    fails(r"has no column 'image'; choose with --image_column from \['picture', 'label'\]", parquet)
    fails(r"the column 'label' of .* holds Value\('int64'\), not images", parquet, image_column="label")
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": []}, features=features).to_parquet(str(tmp_path / "empty.parquet"))
    fails("'.*empty.parquet' holds no image: its files have no rows", tmp_path / "empty.parquet")
    fails("hold 1 .*; at least 2 are needed", write_images(tmp_path / "one", 1))

    monkeypatch.setattr(datasets.config, "PIL_AVAILABLE", False)
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        load_images([parquet], processor())


def test_only_what_is_read_is_decoded(tmp_path: Path) -> None:
    folder = Path(write_images(tmp_path / "a", 0, 1))
    (folder / "000.png").write_bytes(b"broken")
    (folder / "001.png").write_bytes(b"broken")
    train, _ = load_images([str(folder)], processor())
    with pytest.raises(DataError, match=r"cannot read the image '.*00\d\.png': cannot identify image file"):
        train[0]


def test_splits_of_folders_are_told_apart_and_empty_parts_passed_over(tmp_path: Path) -> None:
    write_images(tmp_path / "a" / "train" / "cat", 1, 2)
    write_images(tmp_path / "a" / "test" / "cat", 3, 4)
    train, heldout = load_images([str(tmp_path / "a")], processor())
    assert sorted(levels(train) + levels(heldout)) == [1, 2]
    (tmp_path / "b").mkdir()
    write_parquet(tmp_path / "b" / "0.parquet", "image", 5, 6)
    features = datasets.Features({"image": datasets.Image(), "id": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [], "id": []}, features=features).to_parquet(str(tmp_path / "b" / "1.parquet"))
    train, heldout = load_images([str(tmp_path / "b")], processor())
    assert sorted(levels(train) + levels(heldout)) == [5, 6]
