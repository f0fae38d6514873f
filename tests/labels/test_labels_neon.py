"""`get` from NEON's API, served by this machine: plans, downloads, records and their faults."""

from __future__ import annotations

import hashlib
import json
import random
import time
from dataclasses import replace

import pytest

from canopy.errors import AreaError, DataError, FetchError, InputError, OutputError
from canopy.geo.area import AOI
from canopy.labels import fetch
from canopy.labels.fetch import RECORD, RemoteFile, Wish, get_files, verify_folder
from canopy.labels.hosts import plan_get

TOKEN = "eyJ-top-secret-token"
MONTH = "STEI-2022-07"


def body(name: str, size: int = 5000) -> bytes:
    return random.Random(name).randbytes(size)


# ---- NEON ------------------------------------------------------------------------------------
class Neon:
    """The API's two listings, behind a token, in two pages; files behind a signature that runs out."""

    def __init__(self, server) -> None:
        self.server, self.release = server, "RELEASE-2024"
        corners = [(e, n) for e in (297, 298) for n in (5041, 5042)]
        self.names = [f"NEON_D05_STEI_DP3_{e}000_{n}000_CHM.tif" for e, n in corners]
        server.signature = "good"
        for name in self.names:
            server.put(f"/signed/{name}", body(name))
        rows = [{"siteCode": "STEI", "availableMonths": ["2022-07", "2019-06"]}]
        server.put("/api/products/DP3.30015.001", {"data": {"siteCodes": rows}})
        for month in ("2019-06", "2022-07"):
            server.routes[f"/api/data/DP3.30015.001/STEI/{month}"] = self.files

    def files(self, path, query, _body):
        if not self.server.token_ok:
            return 401, {}, b"no token"
        page = int(query.get("page", ["0"])[0])
        signature = self.server.signature if self.server.fresh else "stale"
        self.server.fresh = True
        rows = [
            {
                "name": name, "size": "5000", "md5": hashlib.md5(body(name)).hexdigest(),
                "url": f"{self.server.url}/signed/{name}?sig={signature}",
            }
            for name in self.names[2 * page : 2 * page + 2]
        ]  # fmt: skip
        rows.append({"name": "readme.txt", "size": 3, "url": f"{self.server.url}/readme.txt"})
        more = {} if page else {"Link": f'<{path.split("?")[0]}?page=1>; rel="next"'}
        answer = json.dumps({"data": {"files": rows, "release": self.release}}).encode()
        return 200, {"Content-Type": "application/json", **more}, answer


@pytest.fixture
def neon(server, point_at, monkeypatch):
    monkeypatch.setenv("NEON_API_TOKEN", TOKEN)
    server.token_ok = server.fresh = True
    point_at("neon", f"{server.url}/api")
    return Neon(server)


def tree(size_m: float = 200) -> AOI:
    """Around Treehaven's tower: within one tile of STEI's flights."""
    return AOI.from_bbox([45.49369, -89.58571], size_m=size_m)


def test_neon_files_are_listed_paged_chosen_by_area_fetched_and_checked(neon, tmp_path, tells_no_secret):
    plan = plan_get("neon", Wish(area=tree(60)))
    tells_no_secret(plan)
    tells_no_secret(plan.facts())
    assert [f.name for f in plan.files] == ["NEON_D05_STEI_DP3_297000_5041000_CHM.tif"]
    assert (
        plan.total_bytes == 5000
        and plan.files[0].day == "2022-07"
        and "newest year of 2019-06 to 2022-07" in plan.notes[0]
    )
    fetched, kept = get_files(plan, tmp_path / "out")
    assert fetched == ["STEI-2022-07/NEON_D05_STEI_DP3_297000_5041000_CHM.tif"] and kept == []
    assert (tmp_path / "out" / plan.files[0].path).read_bytes() == body(plan.files[0].name)
    assert verify_folder(tmp_path / "out") == {"folder": str(tmp_path / "out"), "files": 1, "problems": {}}
    tells_no_secret((tmp_path / "out" / RECORD).read_text())


def test_a_site_published_under_another_one_is_looked_for_there(neon):
    plan = plan_get("neon", Wish(sites=("TREE",), datetime="2019"))
    assert len(plan.files) == 4 and {f.day for f in plan.files} == {"2019-06"}
    assert plan.notes == ("TREE is published under STEI",)
    assert plan_get("neon", Wish(sites=("STEI",), match="298000_50[4]1")).files[0].name == neon.names[2]


def test_every_flight_in_the_dates_is_listed_and_provisional_ones_said(neon):
    plan = plan_get("neon", Wish(area=tree(), datetime="2018/2023"))
    assert [f.path for f in plan.files] == [
        f"STEI-{f.day}/{neon.names[n]}" for f, n in zip(plan.files, (0, 2, 0, 2), strict=True)
    ]
    assert [f.day for f in plan.files] == ["2019-06", "2019-06", "2022-07", "2022-07"] and plan.notes == ()
    with pytest.raises(AreaError, match=r"no DP3.30015.001 in 2030"):
        plan_get("neon", Wish(area=tree(), datetime="2030"))
    neon.release = "PROVISIONAL"
    assert "STEI-2022-07 is provisional" in plan_get("neon", Wish(area=tree())).notes[-1]


def test_without_or_with_a_wrong_token_the_host_is_named_and_the_remedy(
    neon, server, monkeypatch, tells_no_secret
):
    server.token_ok = False
    with pytest.raises(
        FetchError, match=r"refuses the token in NEON_API_TOKEN \(401\).*Set NEON_API_TOKEN"
    ) as caught:
        plan_get("neon", Wish(area=tree()))
    tells_no_secret(caught.value)
    monkeypatch.delenv("NEON_API_TOKEN")
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+ asks for a token"):
        plan_get("neon", Wish(area=tree()))
    assert server.asked("/api/data") == 2  # a refusal is not retried


def test_a_signature_that_ran_out_is_renewed_whatever_the_hosts_word_for_it(neon, server, tmp_path):
    """Google's storage says 400 ExpiredToken, S3 401 or 403, Azure 409."""
    wish, name = Wish(sites=("STEI",), match="297000_5041"), neon.names[0]
    server.fresh = False  # the first listing gives stale signatures
    get_files(plan_get("neon", wish), tmp_path)
    assert server.asked("sig=stale") >= 1 and server.asked("sig=good") == 1
    for status in (400, 401, 403, 409):
        asked = server.asked("/api/data")
        server.fail("/signed/", times=1, status=status, body=b"<Error><Code>ExpiredToken</Code></Error>")
        get_files(plan_get("neon", wish), tmp_path / str(status))
        assert server.asked("/api/data") - asked == 4, "two pages for the plan, two for one renewal"
        assert (tmp_path / str(status) / MONTH / name).read_bytes() == body(name)


def test_a_limit_of_requests_is_waited_for_or_said(neon, server):
    """Without a token NEON allows 200 requests; its answer says when the count starts anew."""
    limit = {"x-ratelimit-limit": "200", "x-ratelimit-remaining": "0"}
    for wait in ("0.01", str(time.time() + 0.01)):
        server.fail("/api/data", times=1, status=429, headers=limit | {"x-ratelimit-reset": wait})
        assert plan_get("neon", Wish(sites=("STEI",))).files
    server.fail("/api/data", times=9, status=429, headers=limit | {"x-ratelimit-reset": "900"})
    with pytest.raises(FetchError, match="asks to wait 900 s"):
        plan_get("neon", Wish(sites=("STEI",)))


def test_a_batch_is_noted_once_also_when_it_fails(neon, server, tmp_path, monkeypatch):
    """Thousands of tiles are no thousands of rewritten records; what came before an error is noted."""
    written: list[int] = []
    real = fetch._add_to_record
    monkeypatch.setattr(fetch, "_add_to_record", lambda *args: (written.append(len(args[1])), real(*args)))
    wish = Wish(sites=("STEI",))
    get_files(plan_get("neon", wish), tmp_path / "whole")
    assert written == [4]
    server.put(f"/signed/{neon.names[3]}", b"x" * 5000)
    with pytest.raises(DataError):
        get_files(plan_get("neon", wish), tmp_path / "part")
    there = {path.name for path in (tmp_path / "part" / MONTH).glob("*.tif")}
    noted = json.loads((tmp_path / "part" / RECORD).read_text())["files"]
    assert {path.rpartition("/")[2] for path in noted} == there == set(neon.names[:3])


def test_no_room_is_said_before_fetching_but_usual_sizes_do_not_refuse(neon, server, tmp_path):
    plan = plan_get("neon", Wish(sites=("STEI",), match="297000_5041"))
    huge = replace(plan, files=tuple(replace(file, bytes=10**18) for file in plan.files))
    with pytest.raises(OutputError, match="GB to fetch"):
        get_files(huge, tmp_path)
    assert server.asked("/signed/") == 0
    rough = replace(plan, files=tuple(replace(file, bytes=10**18, about=True) for file in plan.files))
    assert get_files(rough, tmp_path)[0]


def test_a_file_that_is_there_and_wrong_is_an_error_until_overwritten(neon, tmp_path):
    plan = plan_get("neon", Wish(sites=("STEI",), match="297000_5041"))
    path = tmp_path / MONTH / neon.names[0]
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"4 bytes; expected 5000.*--overwrite"):
        get_files(plan, tmp_path)
    assert path.read_bytes() == b"mine"
    get_files(plan, tmp_path, overwrite=True)
    assert path.read_bytes() == body(neon.names[0])


def test_a_catalogue_cannot_write_outside_the_folder(neon, server):
    neon.names[0] = "../../NEON_D05_STEI_DP3_297000_5041000_CHM.tif"
    with pytest.raises(DataError, match="plain file name"):
        plan_get("neon", Wish(sites=("STEI",)))


def test_areas_without_neon_say_so(neon):
    with pytest.raises(AreaError, match="neon has nothing there"):
        plan_get("neon", Wish(area=AOI.from_bbox([48.4, 2.7], size_m=500)))
    with pytest.raises(AreaError, match="no NEON site within 25 km"):
        plan_get("neon", Wish(area=AOI.from_bbox([41.0, -93.0], size_m=500)))
    with pytest.raises(InputError, match="neither an area nor a site"):
        plan_get("neon", Wish())


# ---- folders and wishes ----------------------------------------------------------------------
@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": {}}}'])
def test_a_record_that_is_none_is_refused(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(DataError, match="cannot be read"):
        verify_folder(tmp_path)
    (tmp_path / RECORD).unlink()
    with pytest.raises(DataError, match="holds no record"):
        verify_folder(tmp_path)


@pytest.mark.parametrize(
    ("wish", "message"), [({"match": "("}, "--match"), ({"datetime": "soon"}, "--datetime")]
)
def test_wishes_are_checked_at_once(wish, message):
    with pytest.raises(InputError, match=message):
        Wish(**wish)


@pytest.mark.parametrize(
    ("url", "name"),
    [("ftp://h/a", "a"), ("https://h/a", ".hidden"), ("https://h/a", "a/b"), ("https://h/a", "a..b")],
)
def test_unsafe_files_are_refused(url, name):
    with pytest.raises(DataError):
        RemoteFile(url=url, name=name)
