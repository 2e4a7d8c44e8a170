"""The page of a run and its figures for Prometheus: read-only, for this machine alone, fresh, and quick at any size."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest

from launch.watch.grid import ranks_grid
from launch.watch.observe import Observer
from launch.watch.page import Page
from launch.watch.prometheus import exposition
from launch.watch.server import Server
from stoker.errors import Refusal
from tests.launch.watch.runs import FakeRun, eventful

ROUTES = ("/", "/live.json", "/status.json", "/curves.json", "/metrics", "/page.css", "/page.js")


@contextmanager
def serving(run: FakeRun) -> Iterator[Server]:
    server = Server(run.root)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(eventful(tmp_path_factory.mktemp("runs") / "run")) as found:
        yield found


def ask(
    server: Server, path: str, method: str = "GET", host: str | None = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": host or f"127.0.0.1:{server.server_port}", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_answers_under_a_policy_that_lets_nothing_else_in(server: Server, path: str) -> None:
    answer, content = ask(server, path)
    assert answer.status == 200 and content
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "frame-ancestors 'none'" in policy and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Access-Control-Allow-Origin"] is None
    again, compressed = ask(server, path, Accept_Encoding="gzip")
    if again.headers["Content-Encoding"] == "gzip":
        assert gzip.decompress(compressed)[:200] == content[:200]
    head, nothing = ask(server, path, "HEAD")
    assert head.status == 200 and nothing == b""


@pytest.mark.parametrize(
    "path",
    [
        "/../config.yaml",
        "/..%2fconfig.yaml",
        "/config.yaml",
        "//etc/passwd",
        "/metrics/",
        "/metrics.jsonl",
        "/page.js/../../observe.py",
        "/%00",
        "/" + "a" * 5000,
        "http://elsewhere/",
    ],
)
def test_nothing_but_the_routes_is_served(server: Server, path: str) -> None:
    answer, content = ask(server, path)
    assert answer.status == 404 and content == b"there is no such page\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_it_only_reads(server: Server, method: str) -> None:
    answer, _ = ask(server, "/", method)
    assert answer.status == 501


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil:1", "[::1"]
)
def test_a_name_that_is_not_this_machines_is_refused(server: Server, host: str) -> None:
    for path in ROUTES:
        answer, content = ask(server, path, host=host or " ")
        assert answer.status == 421 and b"run" not in content


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:1", "[::1]:7007", "[::1]", "10.1.2.3:80"])
def test_addresses_and_localhost_at_any_port_are_this_machine(server: Server, host: str) -> None:
    assert ask(server, "/status.json", host=host)[0].status == 200


def test_it_is_bound_to_loopback(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_refused_in_a_sentence(server: Server, tmp_path: Path) -> None:
    other = FakeRun(tmp_path / "other")
    server_port = server.server_port
    with pytest.raises(Refusal, match=f"port {server_port}"):
        Server(other.root, "127.0.0.1", server_port).server_close()


def test_the_page_is_whole_without_its_script_and_loads_nothing_from_elsewhere(server: Server) -> None:
    page = ask(server, "/")[1].decode()
    for words in (
        "Running",
        "905 of 1,000 steps",
        "fault (hang)",
        "rank 3 was killed by SIGKILL",
        "Draws by source",
        "pp 0",
    ):
        assert words in page
    assert set(re.findall(r'(?:src|href)="([^"#]*)', page)) == {"/page.css", "/page.js", ""}
    assert "style=" not in page and "<style" not in page and not re.search(r"\son\w+=", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_what_a_file_says_does_not_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.train(1, range(3), draws={evil: 3}, aux={evil: 1.0})
    run.end(1, **{"class": "fault", "cause": evil, "rank": 0})
    run.guards([{"at": 1, "attempt": 1, "step": 1, "kind": evil, "text": evil}])
    run.beats(1, 2, r0={"node": evil, "phase": evil, "age_s": 99})
    page = Page(run.root)
    tags: list[tuple[str, dict[str, str | None]]] = []
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

        def handle_data(self, data: str) -> None:
            texts.append(data)

    for markup in (page.html().decode(), *json.loads(page.live())["sections"].values()):
        Reader().feed(markup)
    assert [attributes["src"] for tag, attributes in tags if tag == "script"] == ["/page.js"]
    assert "img" not in {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert evil in "".join(texts)


def test_a_secret_of_the_environment_is_on_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "CANARY-0123456789")
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.train(1, range(3))
    run.end(1, **{"class": "fault", "cause": "key CANARY-0123456789", "rank": 0})
    run.guards([{"at": 1, "attempt": 1, "step": 1, "kind": "slow", "rank": 1, "text": "CANARY-0123456789"}])
    (run.root / "plan.json").write_text("CANARY-0123456789")
    with serving(run) as found:
        for path in ROUTES:
            assert b"CANARY" not in ask(found, path)[1]


def test_the_page_follows_the_run(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    with serving(run) as found:
        assert b"not started" in ask(found, "/")[1].lower()
        run.attempt(1)
        run.train(1, range(7))
        until = time.monotonic() + 20
        while json.loads(ask(found, "/status.json")[1])["step"] != 7:
            assert time.monotonic() < until
            time.sleep(0.05)
        sections = json.loads(ask(found, "/live.json")[1])["sections"]
        assert "7 of 1,000 steps" in sections["head"] and "<svg" in sections["curves"]
        (run.root / "format.json").unlink()
        until = time.monotonic() + 20
        while (answer := ask(found, "/live.json"))[0].status != 503:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert b"format.json" in answer[1]


def test_curves_as_numbers_have_two_thousand_points_and_every_spike(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", steps=9000)
    run.attempt(1)
    run.train(1, range(5000))
    run.train(1, [5000], loss=1234.5)
    run.train(1, [5001], loss=float("nan"))
    run.train(1, range(5002, 6000))
    curves = json.loads(Page(run.root).curves_json())["curves"]
    assert len(curves["loss"]["value"]) <= 2000 and 1234.5 in curves["loss"]["value"]
    assert curves["loss"]["step"][0] >= 0 and len(curves["loss"]["step"]) == len(curves["loss"]["value"])


def test_figures_are_prometheus_text(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    run = eventful(tmp_path / 'run "quoted" \\ and\nbroken')
    found = {
        (sample.name, sample.labels.get("kind") or sample.labels.get("health") or sample.labels.get("state")): sample
        for family in parser.text_string_to_metric_families(exposition(Observer(run.root).look()))
        for sample in family.samples
    }
    assert {sample.labels["run"] for sample in found.values()} == {run.root.name}
    values = {key: sample.value for key, sample in found.items()}
    assert values[("stoker_step", None)] == 905 and values[("stoker_steps_planned", None)] == 1000
    assert values[("stoker_restarts_total", None)] == 2
    assert values[("stoker_faults_total", "hang")] == 1 and values[("stoker_faults_total", "signal")] == 1
    assert values[("stoker_slow_ranks", None)] == 1 and values[("stoker_ranks", "quiet")] == 1
    assert values[("stoker_state", "running")] == 1 and values[("stoker_state", "done")] == 0
    assert 0 < values[("stoker_useful_time_ratio", None)] < 1
    last = run.event(3, 904)
    assert values[("stoker_loss", None)] == last.loss and values[("stoker_grad_norm", None)] == last.grad_norm
    assert ("stoker_mfu_ratio", None) not in values


def test_figures_that_are_not_finite_are_prometheus_text(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.train(1, [0], loss=float("nan"), grad_norm=float("inf"))
    families = parser.text_string_to_metric_families(exposition(Observer(run.root).look()))
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values["stoker_loss"] != values["stoker_loss"] and values["stoker_grad_norm"] == float("inf")


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 8), (3, 8), (6, 3), (257, 8), (10_000, 72), (300, 200)])
def test_the_grid_has_each_rank_once_in_the_colour_of_its_health(tmp_path: Path, ranks: int, per_node: int) -> None:
    run = FakeRun(tmp_path / "run", ranks=ranks)
    run.attempt(1)
    run.train(1, range(3))
    odd = {f"r{ranks - 1}": {"alive": False}}
    run.beats(1, 2, per_node=per_node, **odd)
    (drawn,) = ranks_grid(Observer(run.root).look().ranks)
    if ranks <= 256:
        looks = [rect.get("class") for rect in drawn.iter("rect")]
        assert looks == ["cell c2"] * (ranks - 1) + ["cell c6"]
        corners = {(rect.get("x"), rect.get("y")) for rect in drawn.iter("rect")}
        assert len(corners) == ranks
    else:
        strokes = {path.get("class"): path for path in drawn.iter("path")}
        assert set(strokes) == {"stroke c2", "stroke c6 strong"}
        width = float(strokes["stroke c2"].get("stroke-width", "")) + 0.8
        lengths = [float(part) + 0.8 for part in re.findall(r"h([\d.]+)", strokes["stroke c2"].get("d", ""))]
        assert round(sum(lengths) / width) == pytest.approx(ranks - 1, abs=len(lengths))
    assert f"{ranks - 1:,}" in "".join(drawn.itertext()) and "gone" in "".join(drawn.itertext())


def test_markup_of_every_section_is_well_formed(tmp_path: Path) -> None:
    for section in Page(eventful(tmp_path / "run").root).sections().values():
        whole = re.sub(r"<(meta|link|img|br)([^>]*)>", r"<\1\2/>", section)
        fromstring(f"<div>{whole}</div>")


@pytest.mark.verify
def test_ten_thousand_ranks_and_a_million_steps_are_answered_in_half_a_second(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", steps=2_000_000, ranks=10_000)
    run.attempt(1)
    template = run.event(1, 123_456_789).to_line()
    with open(run.root / "metrics.jsonl", "w") as file:
        file.writelines(template.replace("123456789", str(step)) + "\n" for step in range(1_000_000))
    run.beats(1, 1_000_000)
    with serving(run) as found:
        ask(found, "/")
        for step, path in enumerate(("/", "/live.json", "/live.json", "/metrics", "/curves.json", "/status.json")):
            run.train(1, [1_000_000 + step])
            time.sleep(1.1)  # so that each of them looks at the run
            began = time.process_time()
            assert ask(found, path, Accept_Encoding="gzip")[0].status == 200
            took = time.process_time() - began
            print(f"{path}: {took:.3f} s of processor time")
            assert took < 0.5
