"""Sources: a fixed order, keys that a tar shard can hold, and bytes that pass through untouched."""

import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.errors import PipelineError, SourceError
from pipeline.sources import Cifar10, Digits, Folder, Sample, Source, open_source
from pipeline.sources.base import make_keys

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"
DIGITS_VIT = REPO / "examples" / "digits_vit"
CIFAR10_OFFICIAL = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

needs_cifar10 = pytest.mark.skipif(not (SHARED / "data/cifar10").is_dir(), reason="no CIFAR-10 beside the checkout")
needs_imagenet = pytest.mark.skipif(
    not (SHARED / "data/imagenet-sample/images.tar").is_file(), reason="no ImageNet sample beside the checkout"
)


def write_folder(root: Path, names: list[str]) -> Path:
    """Each file holds its own name: no source may need an image to decode."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def write_tar(path: Path, names: list[str], *, form: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, form) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def cifar10_names(split: str) -> list[str]:
    return [f"{split}/{name}/{index:04d}.jpg" for name in CIFAR10_OFFICIAL for index in range(2)]


def assert_sound(source: Source) -> list[Sample]:
    samples = list(source)
    assert samples == list(source), "the order must not change"
    assert len(samples) == len(source)
    keys = [sample.key for sample in samples]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", key) for key in keys)
    assert all(sample.label is None or 0 <= sample.label < len(source.classes) for sample in samples)
    return samples


# ---- digits ----


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_digits_keep_the_source_contract(split):
    assert_sound(Digits(split))


def test_train_and_test_digits_partition_all_digits():
    train, test, everything = (list(Digits(split)) for split in ("train", "test", "all"))
    assert sorted(train + test, key=lambda sample: sample.key) == everything
    assert not {sample.key for sample in train} & {sample.key for sample in test}
    assert len(everything) == 1797


def test_every_fifth_digit_of_each_class_is_a_test_digit():
    n_all = Counter(sample.label for sample in Digits("all"))
    n_test = Counter(sample.label for sample in Digits("test"))
    assert n_test == {label: n // 5 for label, n in n_all.items()}


def test_digit_pngs_lose_nothing():
    data = load_digits()
    for index, sample in enumerate(Digits("all")):
        image = Image.open(io.BytesIO(sample.image))
        assert (image.mode, image.size, sample.extension) == ("L", (8, 8), "png")
        np.testing.assert_array_equal(np.round(np.asarray(image, dtype=float) * 16 / 255), data.images[index])
        assert (sample.key, sample.label) == (f"digits-{index:04d}", data.target[index])


# ---- cifar10 ----


def cifar10_tars(root: Path) -> Path:
    for split in ("train", "test"):
        write_tar(root / f"{split}.tar", cifar10_names(split))
    return root


def cifar10_folders(root: Path) -> Path:
    return write_folder(root, cifar10_names("train") + cifar10_names("test"))


def cifar10_bare_tars(root: Path) -> Path:
    """Class folders at the top of each tar: only its file name tells the split."""
    for split in ("train", "test"):
        write_tar(root / f"{split}.tar", [name.partition("/")[2] for name in cifar10_names(split)])
    return root


def cifar10_one_tar(root: Path) -> Path:
    return write_tar(root / "both.tar", ["./" + n for n in cifar10_names("train") + cifar10_names("test")])


LAYOUTS = [cifar10_tars, cifar10_folders, cifar10_bare_tars, cifar10_one_tar]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_cifar10_reads_the_same_from_every_layout(tmp_path, layout, split):
    samples = assert_sound(Cifar10(layout(tmp_path), split))
    parts = ["train", "test"] if split == "all" else [split]
    assert [(sample.key, sample.label) for sample in samples] == [
        (f"{part}-{name}-{index:04d}", label)
        for part in parts
        for label, name in enumerate(CIFAR10_OFFICIAL)
        for index in range(2)
    ]


def test_cifar10_classes_are_in_the_official_order():
    assert list(Cifar10.classes) == CIFAR10_OFFICIAL


def test_cifar10_bytes_pass_through_untouched(tmp_path):
    samples = Cifar10(cifar10_tars(tmp_path), "all")
    assert [sample.image.decode() for sample in samples] == cifar10_names("train") + cifar10_names("test")


def test_cifar10_reads_one_tar_given_by_itself(tmp_path):
    assert len(Cifar10(cifar10_tars(tmp_path) / "test.tar", "test")) == 20


@pytest.mark.parametrize("name", ["train/zebra/1.jpg", "train/1.jpg", "train/cat/deep/1.jpg", "train/x/cat/1.jpg"])
def test_cifar10_refuses_an_image_outside_the_ten_class_folders(tmp_path, name):
    with pytest.raises(SourceError, match=re.escape(name.removeprefix("train/"))):
        Cifar10(write_folder(tmp_path, ["train/cat/0.jpg", name]), "train")


def test_cifar10_all_needs_both_splits(tmp_path):
    with pytest.raises(SourceError, match=r"Expected 'test\.tar' or 'test/'.*found 'train'"):
        Cifar10(write_folder(tmp_path, cifar10_names("train")), "all")


# ---- folder ----


def test_a_folder_and_its_tar_give_the_same_samples_whatever_the_archive_order(tmp_path):
    names = ["b/2.JPG", "a/1.png", "top.webp", "a/deep/3.tiff", "b/1.jpeg", "a.x/1.gif"]
    folder = Folder(write_folder(tmp_path / "images", names), "all")
    tar = Folder(write_tar(tmp_path / "images.tar", names), "all")
    assert assert_sound(folder) == assert_sound(tar)
    assert folder.classes == tar.classes == ("a", "a.x", "b", "deep")
    assert [sample.image.decode() for sample in folder] == sorted(names)


def test_the_immediate_parent_folder_is_the_class_and_top_level_images_have_none(tmp_path):
    source = Folder(write_folder(tmp_path, ["x/dog/1.jpg", "y/dog/1.jpg", "cat/1.jpg", "0.jpg"]))
    assert source.classes == ("cat", "dog")
    assert {s.image.decode(): s.label for s in source} == {
        "0.jpg": None, "cat/1.jpg": 0, "x/dog/1.jpg": 1, "y/dog/1.jpg": 1,
    }  # fmt: skip


def test_extensions_are_lower_case_and_without_the_dot(tmp_path):
    assert [s.extension for s in Folder(write_folder(tmp_path, ["1.JPEG", "2.Png"]))] == ["jpeg", "png"]


def test_files_that_are_not_images_are_ignored_and_counted(tmp_path):
    names = ["a/1.jpg", "a/notes.txt", "LICENSE", "a/._1.jpg", ".DS_Store"]
    for path in (write_folder(tmp_path / "f", names), write_tar(tmp_path / "t.tar", names)):
        source = Folder(path)
        assert (len(source), source.n_ignored) == (1, 4)


@pytest.mark.parametrize("as_tar", [False, True], ids=["folder", "tar"])
def test_a_split_folder_is_used_where_there_is_one_and_keys_do_not_depend_on_it(tmp_path, as_tar):
    names = ["train/cat/1.jpg", "train/dog/1.jpg", "val/dog/1.jpg"]
    path = write_tar(tmp_path / "t.tar", names) if as_tar else write_folder(tmp_path / "f", names)
    assert [s.key for s in Folder(path, "train")] == ["train-cat-1", "train-dog-1"]
    assert [s.key for s in Folder(path, "val")] == ["val-dog-1"]
    assert [s.key for s in Folder(path, "all")] == ["train-cat-1", "train-dog-1", "val-dog-1"]
    assert Folder(path, "val").classes == ("dog",)


def test_without_split_folders_train_and_all_mean_everything_and_test_is_an_error(tmp_path):
    path = write_folder(tmp_path, ["cat/1.jpg", "dog/1.jpg"])
    assert list(Folder(path, "train")) == list(Folder(path, "all"))
    with pytest.raises(SourceError, match=r"Expected a folder 'test'.*found 'cat', 'dog'.*split 'all'"):
        Folder(path, "test")


def test_train_never_takes_in_the_images_of_another_split(tmp_path):
    with pytest.raises(SourceError, match="found 'val'"):
        Folder(write_folder(tmp_path, ["training/cat/1.jpg", "val/cat/1.jpg"]), "train")


def test_a_data_set_made_of_links_is_read_and_a_loop_of_links_is_refused(tmp_path):
    real = write_folder(tmp_path / "real", ["cat/1.jpg"])
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to(real / "cat")
    assert [s.key for s in Folder(tmp_path / "links")] == ["cat-1"]
    (real / "cat" / "again").symlink_to(real)
    with pytest.raises(SourceError, match=r"found '.*again' again through a link"):
        Folder(real)


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    write_tar(tmp_path / "images.tar", ["1.jpg"])
    with pytest.raises(SourceError, match=r"found none and 1 other file\(s\), the first 'images\.tar'"):
        Folder(tmp_path)


# ---- keys ----


@given(st.sets(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8), min_size=1, max_size=20))
def test_any_file_names_give_valid_unique_keys(stems):
    names = [f"{stem}/{stem}.jpg" for stem in stems]
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    for key in keys:
        Sample(key, b"", "jpg", None)  # validates the key


def test_names_that_would_share_a_key_are_told_apart_whatever_else_is_listed():
    first = make_keys(["a/b.jpg", "a/b.png", "a-b.jpg"])
    assert len(set(first)) == 3
    assert make_keys(["other.jpg", "a-b.jpg", "a/b.jpg"])[1:] == [first[2], first[0]]


@pytest.mark.parametrize("key", ["a.b", "/a", "../a", "a/b", "", "é", "-x", "a\n"])
def test_a_sample_refuses_a_key_that_a_tar_shard_could_not_hold(key):
    with pytest.raises(SourceError, match="Expected a key"):
        Sample(key, b"", "jpg", None)


# ---- tars that cannot be trusted, and wrong paths ----


@pytest.mark.parametrize("name", ["/etc/evil.jpg", "../evil.jpg", "a/../../evil.jpg"])
def test_a_tar_member_that_would_escape_is_refused_by_name(tmp_path, name):
    with pytest.raises(SourceError, match=re.escape(f"member '{name}'")):
        Folder(write_tar(tmp_path / "t.tar", ["a/1.jpg", name]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_special_files_in_a_tar_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a/odd.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(SourceError, match=r"member 'a/odd\.jpg'"):
        Folder(path)


def test_a_tar_that_holds_a_name_twice_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"'a/1\.jpg' twice"):
        Folder(write_tar(tmp_path / "t.tar", ["a/1.jpg", "./a/1.jpg"]))


@pytest.mark.parametrize("form", ["w:gz", "w:xz"])
def test_a_compressed_tar_is_refused_with_the_remedy(tmp_path, form):
    with pytest.raises(SourceError, match="Decompress"):
        Folder(write_tar(tmp_path / "t.tar", ["a/1.jpg"], form=form))


@pytest.mark.parametrize("n_bytes", [612, 700, 1024, 1124, 1536, 1600, 2048])
def test_a_truncated_tar_is_never_taken_for_a_whole_one(tmp_path, n_bytes):
    path = write_tar(tmp_path / "t.tar", ["a" * 90 + "/1.jpg", "b" * 90 + "/2.jpg"])
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(SourceError, match="copy"):
        Folder(path)


def test_a_damaged_header_does_not_end_a_tar_early(tmp_path):
    path = write_tar(tmp_path / "t.tar", ["a/1.jpg", "a/2.jpg"])
    damaged = bytearray(path.read_bytes())
    damaged[1024:1034] = b"\xff" * 10  # in the second header
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match="at byte 1,024, found the tar cut or damaged"):
        Folder(path)


def test_a_tar_cut_short_after_it_was_opened_is_noticed(tmp_path):
    path = write_tar(tmp_path / "t.tar", ["a/1.jpg"])
    source = Folder(path)
    path.write_bytes(path.read_bytes()[:514])
    with pytest.raises(SourceError, match=r"Expected 7 bytes for 'a/1\.jpg'.*found 2"):
        list(source)


def test_an_image_deleted_after_it_was_listed_is_a_source_error(tmp_path):
    source = Folder(write_folder(tmp_path, ["a/1.jpg"]))
    (tmp_path / "a/1.jpg").unlink()
    with pytest.raises(SourceError, match=r"Expected to read.*1\.jpg"):
        list(source)


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_a_wrong_path_names_itself_and_the_remedy(tmp_path, name):
    with pytest.raises(SourceError, match=r"Expected .* at '.*nowhere', found nothing\. Check the path"):
        open_source(name, tmp_path / "nowhere")


# ---- open_source ----


def test_open_source_knows_the_three_names(tmp_path):
    assert isinstance(open_source("digits"), Digits)
    assert isinstance(open_source("cifar10", str(cifar10_tars(tmp_path)), "test"), Cifar10)
    assert isinstance(open_source("folder", tmp_path / "test.tar", "all"), Folder)


@pytest.mark.parametrize(
    ("name", "path", "split", "message"),
    [
        ("mnist", None, "train", "Expected one of digits, cifar10, folder, found source 'mnist'"),
        ("digits", "somewhere", "train", "Expected no path"),
        ("folder", None, "train", "found no path"),
        ("digits", None, "val", "Expected split 'train', 'test' or 'all'.*found 'val'"),
        ("cifar10", ".", "val", "Expected split 'train', 'test' or 'all'.*found 'val'"),
    ],
)
def test_open_source_says_what_it_expected(name, path, split, message):
    with pytest.raises(SourceError, match=message) as caught:
        open_source(name, path, split)
    assert isinstance(caught.value, PipelineError)
    assert "\n" not in str(caught.value)


# ---- the real data, and the shipped model ----


@pytest.mark.shared
@needs_cifar10
def test_the_real_cifar10_test_tar_is_balanced_and_untouched():
    path = SHARED / "data/cifar10/test.tar"
    samples = assert_sound(Cifar10(path.parent, "test"))
    assert Counter(sample.label for sample in samples) == dict.fromkeys(range(10), 1000)
    with tarfile.open(path) as tar:
        for sample in samples[::999]:
            split, name, index = sample.key.split("-")
            member = tar.extractfile(f"{split}/{name}/{index}.jpg")
            assert member is not None
            assert member.read() == sample.image


@pytest.mark.slow
@pytest.mark.shared
@needs_cifar10
def test_the_real_cifar10_train_tar_holds_5000_images_of_each_class():
    source = Cifar10(SHARED / "data/cifar10/train.tar", "train")
    assert Counter(sample.label for sample in source) == dict.fromkeys(range(10), 5000)


@pytest.mark.shared
@needs_imagenet
def test_the_real_imagenet_sample_is_flat_and_unlabelled():
    samples = assert_sound(source := Folder(SHARED / "data/imagenet-sample/images.tar"))
    assert (len(samples), source.classes, source.n_ignored) == (500, (), 0)
    assert samples[0].key == "n01440764_tench"
    assert {sample.extension for sample in samples} == {"jpeg"}
    assert Image.open(io.BytesIO(samples[0].image)).format == "JPEG"


def test_the_shipped_digits_vit_loads_through_timm_and_reads_digits():
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    model = timm.create_model(f"local-dir:{DIGITS_VIT}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    samples = list(Digits("test"))
    images = torch.stack([transform(Image.open(io.BytesIO(s.image)).convert("RGB")) for s in samples])
    with torch.inference_mode():
        predicted = model(images).argmax(dim=1)
    accuracy = (predicted == torch.tensor([s.label for s in samples])).float().mean().item()
    assert accuracy >= 0.95
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert (DIGITS_VIT / "model.safetensors").stat().st_size < 2_000_000
