"""Shards of others, cut off or damaged: what can be read is; nothing is guessed or waited for."""

import io
import os
import random
import signal
import tarfile
import time
import tracemalloc

import pytest

from msn.data.shards import shard_source
from msn.data.tar_members import NO_CLASS, read_shard
from msn.errors import UserError
from msn.images.kinds import BadImageError
from tests.data.logs import warnings_in

GIB = 1 << 30
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def member(name, data=b"", form=tarfile.GNU_FORMAT, size=None, **fields):
    """Header and data of a member; the header may claim another size."""
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form, "utf-8", "surrogateescape") + padded(data)


def padded(data):
    return data + bytes(-len(data) % 512)


def with_field(header, begin, value):
    """A header with another field and the right checksum."""
    block = bytearray(header)
    block[begin : begin + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def pax(records, kind=b"x"):
    """A PAX header as it is given."""
    return with_field(member("PaxHeaders/x", records), 156, kind)


END = bytes(1024)
FIRST = member("0.jpg", b"image 0")
NEGATIVE = b"\xff" * 12
SIZES = {
    "20 GB": (f"{20 * GIB // 4:011o}\0".encode(), "claims"),
    "4 TB": (b"\x80" + (4 << 40).to_bytes(11, "big"), "claims"),
    "2 ** 80": (b"\x80" + (1 << 80).to_bytes(11, "big"), "claims"),
    "negative": (NEGATIVE, "not a number >= 0"),
    "negative, back to the start": ((-1024).to_bytes(12, "big", signed=True), "not a number >= 0"),
    "no number": (b"lots of it\0\0", "not a number >= 0"),
}


@pytest.fixture
def shard(tmp_path):
    def write(*parts):
        path = tmp_path / "a.tar"
        path.write_bytes(b"".join(parts))
        return str(path)

    return write


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S"])
def test_a_size_that_cannot_be_ends_the_shard_where_it_stands(size, kind, shard):
    field, why = SIZES[size]
    damaged = with_field(with_field(member("1.jpg", b"image 1"), 124, field), 156, kind)
    tracemalloc.start()
    contents = read_shard(shard(FIRST, damaged, member("2.jpg", b"image 2"), END))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert [image.name for image in contents.images] == ["0.jpg"]
    assert contents.damage.startswith(f"byte {len(FIRST)} (")
    assert why in contents.damage or "sparse" in contents.damage


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        (pax(b"28 size=9999999999999999999\n"), "claims 9999999999999999999 bytes"),
        (pax(b"14 size=-9999\n"), "not a number >= 0"),
        (pax(b"22 GNU.sparse.map=0,1\n"), "a sparse file"),
        (pax(b"9999999 path=a\n"), "a PAX header is damaged"),
        (pax(b"0 path=a\n"), "a PAX header is damaged"),
        (pax(b"1" * 60_000), "a PAX header is damaged"),
        (pax(b"11 path=ab\n", b"g"), "a header gives all members one name or size"),
        (with_field(member("././@LongLink", b"n" * 300), 156, b"L") + END, "is missing"),
        (with_field(member("././@LongLink", b"n" * 300), 156, b"K"), "a header describes a link"),
    ],
)
def test_headers_that_lie_end_the_shard_where_they_begin(headers, why, shard):
    began = time.monotonic()
    contents = read_shard(shard(FIRST, headers, member("1.jpg", b"image 1"), END))
    assert time.monotonic() - began < 1
    assert [image.name for image in contents.images] == ["0.jpg"]
    assert contents.damage.startswith(f"byte {len(FIRST)} (")
    assert why in contents.damage


def test_a_thousand_long_names_in_a_row_are_read(shard):
    names = with_field(member("././@LongLink", b"9.jpg\0"), 156, b"L") * 1500
    (image,) = read_shard(shard(names, member("1.jpg", b"image"), END)).images
    assert image.name == "9.jpg"


def test_an_archive_without_its_end_is_said_to_be_cut_off(shard):
    contents = read_shard(shard(FIRST))
    assert len(contents.images) == 1
    assert "the end of the archive is missing" in contents.damage


def test_terabytes_of_zeros_behind_the_end_are_not_read(shard):
    path = shard(FIRST, END)
    os.truncate(path, 4 << 40)
    began = time.monotonic()
    assert read_shard(path).damage is None
    assert time.monotonic() - began < 2


def test_links_are_passed_over_and_what_is_too_large_is_not_read(tmp_path, caplog):
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(FIRST + member("1.jpg", type=tarfile.LNKTYPE, linkname="0.jpg"))
        file.write(member("2.jpg", size=20 * GIB))
        file.seek(20 * GIB, os.SEEK_CUR)
        file.write(member("3.jpg", b"image 3") + END)
    source = shard_source(str(tmp_path), key="data.root", use_labels=True)
    assert [source.name(i) for i in range(len(source))] == ["0.jpg", "2.jpg", "3.jpg"]
    with pytest.raises(BadImageError, match="above 1 GiB"):
        source.read(1)
    assert warnings_in(caplog) == [f"{tmp_path}: 1 images are links to others and are skipped"]


def test_a_sample_that_damage_cuts_from_its_number_does_not_cost_all_others_theirs(shard):
    parts = [member(f"{i}.{kind}", b"1") for i in range(3) for kind in ("jpg", "cls")]
    path = shard(*parts[:-1], b"\xff" * 512, END)
    assert [(image.name, image.label) for image in read_shard(path).images] == [
        ("0.jpg", 1),
        ("1.jpg", 1),
    ]


def test_a_block_that_is_there_twice_makes_no_number(shard):
    number = member("0.cls", b"1")
    doubled = number[:512] + padded(b"173 path=" + bytes(3) + b"0.cls") + number[512:]
    contents = read_shard(shard(FIRST, doubled, END))
    assert contents.damage.startswith(f"byte {len(FIRST) + 512} (another block where a class")
    assert [image.label for image in contents.images] == [NO_CLASS]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_of_tar_is_read_as_tarfile_reads_it(form, tmp_path):
    path = tmp_path / "a.tar"
    names = ["a/1.jpg", "./b/2.jpg", "/c/3.jpg", "../d/4.jpg", "e" * 90 + "/" + "f" * 60 + ".jpg"]
    names += [] if form == "ustar" else ["g" * 200 + "/\xe9\n\udcff.jpg"]
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 600 + number, 1.5
            tar.addfile(info, io.BytesIO(bytes(600 + number)))
    contents = read_shard(str(path))
    with tarfile.open(path) as tar:
        expected = [(m.offset_data, m.size) for m in tar]
    assert [(image.offset, image.size) for image in contents.images] == expected
    plain = ["a/1.jpg", "b/2.jpg", "c/3.jpg", "d/4.jpg", *names[4:]]
    assert [image.name for image in contents.images] == plain
    assert contents.damage is None


def test_pipes_and_devices_are_no_shards(tmp_path, caplog):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    (tmp_path / "gone.tar").symlink_to("nowhere")
    (tmp_path / "a.tar").write_bytes(FIRST + END)
    os.mkfifo(tmp_path / "classes.txt")
    assert len(shard_source(str(tmp_path), key="data.root", use_labels=True)) == 1
    assert [line.partition(": ")[2] for line in warnings_in(caplog)] == [
        "is a link to nothing and is skipped",
        "is a pipe, a socket or a device and is skipped",
        "is a pipe, a socket or a device and is skipped",
    ]
    for name in ("pipe.tar", "zero.tar"):
        with pytest.raises(UserError, match=f"{name}: is a pipe, a socket or a device"):
            shard_source(str(tmp_path / name), key="data.root", use_labels=True)


# The attack: tars with one thing changed. Image i says i in its bytes and has class i % 5.
ATTACKS = 1_000
MOST_MEMORY = 16 << 20  # bytes that reading one of them may take; each is below 40 kB
LONGEST = 2  # seconds


def tar_of(form, with_numbers):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for i in range(12):
            stem = f"class {i % 5}/" + ("long " * 30 if i % 3 == 0 else "") + str(i)
            data = b"image %02d " % i * 60
            pair = {f"{stem}.jpg": data}
            pair |= {f"{stem}.cls": b"%d" % (i % 5)} if with_numbers else {}
            for name, content in pair.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if form == tarfile.USTAR_FORMAT:
                    info.name = name.replace("long ", "")
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def some_header(data, draw):
    starts = [at for at in range(0, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
    return draw.choice(starts)


def flipped(data, draw):
    """Some bytes of a header, which its checksum sees."""
    at = some_header(data, draw)
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        changed[at + draw.randrange(512)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def forged(data, draw):
    """A size or a kind with its right checksum."""
    at = some_header(data, draw)
    size = draw.choice([field for field, _ in SIZES.values()])
    size = draw.choice([size, b"%011o\0" % draw.randrange(1 << 33)])
    begin, value = draw.choice([(124, size), (156, draw.choice(b"0123456789LKSxgXVMD").to_bytes())])
    return data[:at] + with_field(data[at : at + 512], begin, value) + data[at + 512 :]


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def blocks(data, draw):
    """Blocks that are gone, there twice, zeros or noise; fewer than the three of an image.

    Without three in the right place what is left may be a whole tar, in which nothing is wrong.
    """
    begin = 512 * draw.randrange(len(data) // 512)
    end = begin + 512 * draw.randint(1, 2)
    noise = bytes(draw.randrange(256) for _ in range(512))
    new = draw.choice([b"", data[begin:end] * 2, bytes(end - begin), noise, noise * 2])
    return data[:begin] + new + data[end:]


def anywhere(data, draw):
    """Noise over any bytes but those of images and numbers, which no checksum covers."""
    at = draw.randrange(512)
    header = some_header(data, draw)
    noise = bytes(draw.randrange(256) for _ in range(512 - at))
    return data[: header + at] + noise + data[header + 512 :]


@pytest.mark.slow
def test_changed_tars_end_in_no_traceback_hang_or_silently_wrong_label(tmp_path, caplog):
    draw = random.Random(20)
    path = tmp_path / "a.tar"
    bases = [tar_of(form, numbers) for form in FORMATS.values() for numbers in (True, False)]
    ways = [flipped, forged, cut, blocks, anywhere]
    unsaid, refused = [], 0

    def too_long(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    began = time.process_time()  # others may use the machine
    tracemalloc.start()
    for number in range(ATTACKS):
        way = ways[number % len(ways)]
        path.write_bytes(way(draw.choice(bases), draw))
        caplog.clear()
        tracemalloc.reset_peak()
        signal.alarm(LONGEST)
        try:
            source = shard_source(str(path), key="data.root", use_labels=True)
            images = [source.read(i) for i in range(len(source))]
        except UserError:
            refused += 1
            continue
        finally:
            signal.alarm(0)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY, (number, way)
        if source.labels is None or warnings_in(caplog):
            continue
        for image, label in zip(images, source.labels, strict=True):
            if image.startswith(b"image ") and image[6:8].isdigit():
                right = str(int(image[6:8]) % 5)
                if source.classes[label].removeprefix("class ") != right:
                    unsaid.append((number, way.__name__, image[:9], source.classes[label]))
    tracemalloc.stop()
    assert not unsaid
    assert refused < ATTACKS / 2  # else they would show little
    assert time.process_time() - began < 30
