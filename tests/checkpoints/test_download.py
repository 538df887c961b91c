"""Downloads, from a server in this process: fetched once, whole, and the file that was meant."""

import hashlib
import http.server
import re
import threading
from pathlib import Path

import pytest
import torch

from mmvssm.checkpoints import read_checkpoint
from mmvssm.checkpoints.download import download, sha256_of_file
from mmvssm.utils import model_index


class Server(http.server.ThreadingHTTPServer):
    """Gives the files in `content`; `behaviour` of a path may be 'cut' (half of it, then silence) or an error code."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content: dict[str, bytes] = {}
        self.behaviour: dict[str, str | int] = {}
        self.requests: list[str] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.lstrip("/")
        self.server.requests.append(path)
        content, behaviour = self.server.content.get(path), self.server.behaviour.get(path)
        if content is None or isinstance(behaviour, int):
            self.send_error(behaviour or 404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if behaviour == "cut" else content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def running_server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(running_server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for table in (running_server.content, running_server.behaviour, running_server.requests):
        table.clear()
    return running_server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Torch's cache of checkpoints, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def saved(layout: str = "zip") -> bytes:
    import io

    tensors = {"a": torch.arange(5000.0)}
    if layout == "safetensors":
        from safetensors.torch import save

        return save(tensors)
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=layout == "zip")
    return buffer.getvalue()


@pytest.fixture
def known(monkeypatch):
    """Make the zoo know a file: `known(url, sha256)`."""
    models = {}

    def enter(url, sha256):
        models[url] = model_index.ModelInfo(url, None, "ViG", weights=url, sha256=sha256)

    monkeypatch.setattr(model_index, "published_models", lambda: models)
    return enter


def left_in(cache) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()) if cache.exists() else []


NAMES = {"zip": "a.pth", "legacy": "a.pth", "safetensors": "a.safetensors"}


@pytest.mark.parametrize("layout", NAMES)
def test_fetched_once_with_a_progress_bar(server, cache, capfd, layout):
    server.content[NAMES[layout]] = saved(layout)
    for _ in range(2):
        assert torch.equal(read_checkpoint(server.url(NAMES[layout]))["a"], torch.arange(5000.0))
    assert server.requests == [NAMES[layout]]
    assert "100%" in capfd.readouterr().err


@pytest.mark.parametrize("layout", NAMES)
def test_a_download_that_is_cut_short_is_not_kept(server, cache, layout):
    name = NAMES[layout]
    server.content[name], server.behaviour[name] = saved(layout), "cut"
    with pytest.raises(ValueError, match=rf"{name} was downloaded, but the file is .*(truncated|damaged).*not kept"):
        read_checkpoint(server.url(name))
    assert left_in(cache) == []
    del server.behaviour[name]
    assert len(read_checkpoint(server.url(name))["a"]) == 5000


def test_damage_inside_is_seen_without_a_known_checksum(server, cache):
    content = bytearray(saved())
    content[len(content) // 2] ^= 255  # among the numbers: the archive can be opened, and torch reads on
    server.content["a.pth"] = bytes(content)
    with pytest.raises(ValueError, match=r"the file is damaged: the checksum of .*data/0 in it is wrong"):
        read_checkpoint(server.url("a.pth"))
    assert left_in(cache) == []


def test_a_web_page_in_its_place(server, cache):
    server.content["a.pth"] = b"<!DOCTYPE html><title>Sign in</title>"
    with pytest.raises(ValueError, match="the file is a web page, not a checkpoint"):
        read_checkpoint(server.url("a.pth"))
    assert left_in(cache) == []


@pytest.mark.parametrize("code", [404, 503])
def test_an_answer_without_a_file(server, cache, code):
    server.behaviour["a.pth"] = code
    with pytest.raises(ValueError, match=rf"a.pth could not be downloaded \(HTTP Error {code}.*give its path"):
        read_checkpoint(server.url("a.pth"))
    assert left_in(cache) == []


def test_nobody_answers(cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as closed:
        url = closed.url("a.pth")
    with pytest.raises(ValueError, match=r"could not be downloaded \(.*refused"):
        read_checkpoint(url)


class TestKnownChecksum:
    def test_right(self, server, cache, known):
        server.content["vig.pth"] = saved()
        known(server.url("vig.pth"), hashlib.sha256(saved()).hexdigest())
        assert read_checkpoint(server.url("vig.pth"))["a"][-1] == 4999
        assert left_in(cache) == ["vig.pth"]  # under the published name, as the libraries would keep it

    @pytest.mark.parametrize("behaviour", [None, "cut"])
    def test_wrong(self, server, cache, known, behaviour):
        server.content["vig.pth"] = saved()
        server.behaviour["vig.pth"] = behaviour
        known(server.url("vig.pth"), "1" * 64)
        with pytest.raises(ValueError, match=rf"vig.pth gave has the SHA-256 \w{{64}} instead of {'1' * 64}.*not kept"):
            read_checkpoint(server.url("vig.pth"))
        assert left_in(cache) == []

    def test_another_file_in_the_cache_is_replaced(self, server, cache, known, caplog):
        cache.mkdir()
        (cache / "vig.pth").write_bytes(saved("legacy"))
        server.content["vig.pth"] = saved()
        known(server.url("vig.pth"), hashlib.sha256(saved()).hexdigest())
        download(server.url("vig.pth"))
        assert sha256_of_file(cache / "vig.pth") == hashlib.sha256(saved()).hexdigest()

    def test_in_mmengine_too(self, server, cache, known):
        from mmengine.runner.checkpoint import CheckpointLoader

        server.content["vig.pth"] = saved()
        known(server.url("vig.pth"), "1" * 64)
        with pytest.raises(ValueError, match="has the SHA-256"):
            CheckpointLoader.load_checkpoint(server.url("vig.pth"), map_location="cpu")


class TestChecksumInTheName:
    """The convention of torch.hub and the OpenMMLab libraries, which publish_model.py follows."""

    def test_right(self, server, cache):
        name = f"vig-{_lettered(hashlib.sha256(saved()).hexdigest())}.pth"
        server.content[name] = saved()
        assert len(read_checkpoint(server.url(name))["a"]) == 5000
        assert left_in(cache) == [name]

    def test_wrong(self, server, cache):
        server.content["vig-0123abcd.pth"] = saved()
        with pytest.raises(ValueError, match=r"SHA-256 \w{64} instead of one that begins with 0123abcd"):
            read_checkpoint(server.url("vig-0123abcd.pth"))
        assert left_in(cache) == []

    @pytest.mark.parametrize("name", ["vig-20240131.pth", "vig-deep.pth", "ade20k-512x512_tiny.pth", "a-abcdef0.pth"])
    def test_what_is_no_checksum(self, server, cache, name):
        server.content[name] = saved()
        assert len(read_checkpoint(server.url(name))["a"]) == 5000

    def test_mmengine_does_not_check_names(self, server, cache):
        """Some files of other projects were replaced under their old names, and load there."""
        from mmengine.runner.checkpoint import CheckpointLoader

        server.content["vig-0123abcd.pth"] = saved()
        assert len(CheckpointLoader.load_checkpoint(server.url("vig-0123abcd.pth"), map_location="cpu")["a"]) == 5000


def _lettered(digest: str) -> str:
    """Enough digits that one is a letter."""
    return digest[: max(8, re.search("[a-f]", digest).end())]


def test_files_of_one_name_from_two_addresses(server, cache):
    """Hugging Face calls all of them model.safetensors."""
    server.content["b/model.pth"], server.content["b-21k/model.pth"] = saved(), saved("legacy")
    paths = [download(server.url(f"{folder}/model.pth")) for folder in ("b", "b-21k")]
    assert paths[0] != paths[1]
    assert [Path(path).read_bytes() for path in paths] == list(server.content.values())


def test_the_name_in_the_cache(server, cache):
    """Without the query, and readable."""
    server.content["%23v2/tiny%20a.pth?x=1"] = saved()
    assert Path(download(server.url("%23v2/tiny%20a.pth?x=1"))).name == "tiny a.pth"


def test_the_checksums_of_vig_are_those_of_the_zoo():
    url = "https://huggingface.co/hustvl/ViG/resolve/main/vig_t_77p2acc.pth"
    assert model_index.sha256_of(url).startswith("a1eb2901")
    assert model_index.sha256_of(url + "?download=true") == model_index.sha256_of(url)
    assert model_index.sha256_of("https://example.org/a.pth") is None
