"""A run's page served live: the report's own page, news as they come, to this machine alone and for reading alone."""

import base64
import hashlib
import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.browser import page_after_scripts
from tests.support.command_line import environment
from tests.support.report import Maker, Outline, closed, evaluation

from fedkseed.cli.watch import watch_command
from fedkseed.errors import ConfigError, RunFolderError
from fedkseed.report import report
from fedkseed.report.charts import charts
from fedkseed.report.live import Watch
from fedkseed.report.picture import Picture, render, render_svg
from fedkseed.report.reading import read
from fedkseed.runs.folder import RunFolder

Answer = tuple[int, dict[str, str], str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Maker(tmp_path)([evaluation(0, 3.9631), closed(1), evaluation(1, 3.95)], 1)


@pytest.fixture(autouse=True)
def quick_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that say what they would show; a second of drawing is another test's."""
    monkeypatch.setattr("fedkseed.report.render", lambda name, title, draw: Picture(f"<svg>{name}</svg>", b""))
    monkeypatch.setattr("fedkseed.report.live.render_svg", lambda name, draw: f"<svg>{name}</svg>")


@pytest.fixture
def watch(run: Path) -> Iterator[Watch]:
    with Watch(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(watch: Watch, method: str = "GET", path: str = "/", **headers: str) -> Answer:
    connection = http.client.HTTPConnection(*watch.server_address[:2], timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
    connection.close()
    return found


def raw(watch: Watch, request: str) -> str:
    with socket.create_connection(watch.server_address[:2], timeout=60) as connection:
        connection.sendall(request.encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def without_foot(html: str) -> str:
    return re.sub(r"<footer>.*</footer>", "", html, flags=re.DOTALL)


def test_the_page_is_that_of_report(watch: Watch, run: Path) -> None:
    status, headers, html = ask(watch)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert without_foot(html) == without_foot(report(run).read_text(encoding="utf-8"))
    Outline(html)  # balanced
    assert ask(watch, "HEAD")[2] == ""
    assert ask(watch, "HEAD")[1]["content-length"] == headers["content-length"]


def test_its_pictures_are_those_of_report(run: Path) -> None:
    for chart in charts(read(run))[:2]:
        assert chart.draw is not None
        assert render_svg(chart.name, chart.draw) == render(chart.name, chart.title, chart.draw).svg


def test_nothing_new_costs_no_page_and_a_round_shows_at_once(watch: Watch, run: Path) -> None:
    _, headers, before = ask(watch)
    assert ask(watch, **{"If-None-Match": headers["etag"]})[::2] == (304, "")
    folder = RunFolder.open(run)
    ledger = folder.load_checkpoint()
    for event in (closed(2, missing=["site-<b>"], refused={"site-9": "too many scalars"}), evaluation(2, 3.8123)):
        folder.append_metrics(event)
    assert ask(watch, **{"If-None-Match": headers["etag"]})[0] == 304  # a round counts once its ledger is written
    ledger.advance(ledger.history).save(folder.ledger_path)
    status, later, after = ask(watch, **{"If-None-Match": headers["etag"]})
    assert (status, later["etag"] == headers["etag"]) == (200, False)
    text = Outline(after).text
    assert "3.9631 → 3.8123" in text
    assert "Round 2: no reply of site-<b>; refused: site-9." in text
    assert "3.8123" not in before


def test_nothing_of_the_run_is_written(watch: Watch, run: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [run, *run.rglob("*")]}
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert (ask(watch, method)[0] < 400) == (method in ("GET", "HEAD"))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [run, *run.rglob("*")]} == before


@pytest.mark.parametrize("path", ["/index.html", "/config.toml", "/../config.toml", "/?x", "http://evil.example/", "*"])
def test_there_is_one_page(watch: Watch, path: str) -> None:
    assert ask(watch, path=path)[0] in (404, 421)


def hosts(port: int) -> dict[str, list[str]]:
    here = f"127.0.0.1:{port}"
    return {
        "another": [f"evil.example:{port}"],
        "no port": ["127.0.0.1"],
        "another port": [f"127.0.0.1:{port + 1}"],
        "longer": [f"127.0.0.1.evil.example:{port}"],
        "empty": [""],
        "none": [],
        "two": [here, here],
        "two, one another": [here, "evil.example"],
    }


@pytest.mark.parametrize("kind", hosts(0))
def test_a_request_that_names_another_host_is_refused(watch: Watch, kind: str) -> None:
    """A page elsewhere may point its own name at 127.0.0.1; the browser then sends that name."""
    lines = "".join(f"Host: {host}\r\n" for host in hosts(watch.server_address[1])[kind])
    answer = raw(watch, f"GET / HTTP/1.1\r\n{lines}\r\n")
    assert answer.startswith("HTTP/1.0 421 ")
    assert "3.9631" not in answer


def test_this_machine_may_be_called_localhost(watch: Watch) -> None:
    assert ask(watch, Host=f"localhost:{watch.server_address[1]}")[0] == 200


def test_it_listens_on_the_loopback_address_alone(watch: Watch) -> None:
    host, port = watch.server_address[:2]
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def directives(policy: str) -> dict[str, list[str]]:
    return {name: values for name, *values in (part.split() for part in policy.split(";"))}


def test_the_browser_is_told_to_run_the_page_s_own_script_and_to_ask_nobody_else(watch: Watch) -> None:
    _, headers, html = ask(watch)
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == html.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = directives(headers["content-security-policy"])
    assert policy.pop("script-src") == [f"'sha256-{digest}'"]
    assert policy.pop("style-src") == ["'unsafe-inline'"]
    assert policy.pop("connect-src") == ["'self'"]
    assert policy.keys() == {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert all(values == ["'none'"] for values in policy.values())
    assert ask(watch, path="/x")[1]["content-security-policy"] == headers["content-security-policy"]
    assert not re.search(r"\b(src|href)=\"(?!#)|\bon\w+=\"|@import|url\((?!#)", html)


def test_a_run_that_is_damaged_meanwhile_is_one_line(watch: Watch, run: Path) -> None:
    (run / "ledger.safetensors").write_bytes(b"nonsense")
    status, headers, text = ask(watch)
    assert (status, headers["content-type"]) == (503, "text/plain; charset=utf-8")
    assert "ledger.safetensors" in text
    assert "\n" not in text


def test_no_run_and_no_port_are_refused(run: Path, watch: Watch, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nowhere"):
        Watch(tmp_path / "nowhere", 0)
    port = watch.server_address[1]
    with pytest.raises(ConfigError, match=rf"^--port {port}: .*; give another one, or 0 for any that is free$"):
        Watch(run, port)


# --- in a browser ---


def one_after_the_other(*answers: bytes | Exception) -> Callable[[], bytes]:
    """The first at the first call, and so on; the last for good."""
    left = list(answers)

    def content() -> bytes:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return content


@pytest.mark.parametrize("then", ["news", "an end"])
def test_a_browser_shows_news_without_being_asked(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """The script is the page's own and runs under the policy; one that came with the run would not."""
    first = watch.page.content()
    injected = first.replace(b"</main>", b"<script>document.title = 'injected'</script></main>")
    later = injected.replace(b"3.9500", b"1.2345")
    assert later != injected
    end = RunFolderError("the run is gone")
    monkeypatch.setattr(watch.page, "content", one_after_the_other(injected, later if then == "news" else end))
    shown = page_after_scripts(watch.address, tmp_path / "profile", 5000)
    assert "<title>injected" not in shown
    assert ("1.2345" in shown) == (then == "news")
    status = re.search(r'<p id="live" class="([^"]*)">([^<]*)<', shown)
    assert status is not None
    assert status.groups() == (("status", "Live") if then == "news" else ("status bad", "the run is gone"))


# --- the command ---


def test_ctrl_c_ends_the_watching(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(self: Watch) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "serve_forever", interrupted)
    watch_command(run, 0)
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"watching .*run: http://127\.0\.0\.1:\d+/ \(Ctrl-C ends the watching, not the run\)", first)
    assert last == "no longer watching; the run is as it was"


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(run: Path) -> None:
    words = [sys.executable, "-m", "fedkseed", "watch", str(run), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        said = next(line for line in process.stdout if line.startswith("watching"))
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        assert found is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/")
        assert "3.9631" in connection.getresponse().read().decode()
        process.send_signal(signal.SIGINT)
        rest, complaints = process.communicate(timeout=60)
    assert (process.returncode, rest, complaints) == (0, "no longer watching; the run is as it was\n", "")
