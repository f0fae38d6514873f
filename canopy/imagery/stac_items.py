"""STAC items as images: which assets make RGB, when and where; and signatures for those that need one.

Signatures are the Planetary Computer's: a URL is signed just before it is read, and again after a refusal; a
signed one is never kept.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pystac
from pystac.utils import make_absolute_href
from shapely.geometry import MultiPolygon, Polygon, shape

from canopy import web
from canopy.errors import FetchError, ImageryError
from canopy.files import host_of, is_url, redact
from canopy.imagery.bands import find_rgb
from canopy.imagery.base import COLOURS
from canopy.imagery.dates import parse_day
from canopy.imagery.scene import SceneRecord
from canopy.runtime import log

USUAL_KEYS = ("visual", "image", "rgb", "RGB", "ortho", "orthophoto", "true-color", "TCI")
_RASTER_TYPES = ("image/tiff", "image/vnd.stac.geotiff", "image/jp2", "image/jpeg", "image/png")
_RASTER_ENDS = (".tif", ".tiff", ".jp2")
_NOT_DATA_ROLES = {"thumbnail", "overview", "metadata", "mask", "data-mask"}
_ALL_CLOUD = 100.0


def record_of(item: pystac.Item, preferred: Sequence[str] = (), gsd_m: float | None = None) -> SceneRecord:
    """Reduce an item to what reading needs.

    Args:
        item: with absolute hrefs, or with its own address.
        preferred: asset keys to take first.
        gsd_m: ground sample distance where it states none.

    Raises:
        ImageryError: the item has no usable geometry; the message names it.
    """
    properties, base = item.properties, item.get_self_href() or ""
    hrefs, bands = choose_assets(item.assets, preferred)
    more = [asset.extra_fields for asset in item.assets.values()]
    gsds = [fields.get("gsd") or fields.get("eo:gsd") for fields in more]
    try:
        outline = shape(item.geometry)
    except Exception as error:  # shapely raises many kinds on malformed GeoJSON
        raise ImageryError(f"item without a usable geometry ({error})", where=item.id) from None
    outline = outline if outline.is_valid else outline.buffer(0)
    if not isinstance(outline, (Polygon, MultiPolygon)) or outline.is_empty:
        raise ImageryError("item whose geometry is no area", where=item.id)
    cloud = properties.get("eo:cloud_cover", properties.get("tile:clouds_percent"))
    return SceneRecord(
        scene_id=item.id,
        assets=tuple(resolve(href, base) for href in hrefs),
        day=parse_day(str(properties.get("datetime") or properties.get("start_datetime") or "")),
        wkt=outline.wkt,
        bands=bands,
        cloud=_ALL_CLOUD if cloud is None else cloud,
        gsd_m=properties.get("gsd") or min((gsd for gsd in gsds if gsd), default=gsd_m),
    )


def choose_assets(
    assets: Mapping[str, pystac.Asset], preferred: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[int, int, int] | None]:
    """Hrefs that make RGB, and band numbers if the catalog tells them.

    In order: the preferred keys (whatever their roles), the usual keys, an asset whose bands include red,
    green and blue, three assets whose common names are red, green and blue, and the finest of those that
    state their pixel size but no bands (swisstopo). Empty when there are none.
    """
    usable = {key: assets[key] for key in sorted(assets) if _is_raster(assets[key])}
    named = [assets[key] for key in preferred if key in assets]
    named += [usable[key] for key in USUAL_KEYS if key in usable]
    named += [asset for asset in usable.values() if find_rgb(_band_names(asset))]
    if named:
        return (named[0].href,), find_rgb(_band_names(named[0]))
    singles = {tuple(_band_names(asset)): asset.href for asset in reversed(usable.values())}
    if all((colour,) in singles for colour in COLOURS):
        return tuple(singles[colour,] for colour in COLOURS), None
    sized = [asset for asset in usable.values() if "eo:gsd" in asset.extra_fields and not _band_names(asset)]
    finest = min(sized, key=lambda asset: float(asset.extra_fields["eo:gsd"]), default=None)
    return (finest.href,) if finest else (), None


def _is_raster(asset: pystac.Asset) -> bool:
    if _NOT_DATA_ROLES & set(asset.roles or []) or not asset.href:
        return False
    kind = str(asset.media_type or "").split(";")[0].strip().lower()
    return kind in _RASTER_TYPES or urlsplit(asset.href).path.lower().endswith(_RASTER_ENDS)


def _band_names(asset: pystac.Asset) -> list[str]:
    """Lower-case colour of every band: `eo:bands` (STAC 1.0) or `bands` (1.1)."""
    bands = asset.extra_fields.get("eo:bands") or asset.extra_fields.get("bands") or []
    return [
        str(b.get("common_name") or b.get("eo:common_name") or b.get("name") or "").lower() for b in bands
    ]


def resolve(href: str, base: str) -> str:
    """An href relative to its document -> an absolute path or http(s) URL.

    Raises:
        ImageryError: a remote catalog that points at files of this machine, or an unknown scheme.
    """
    if href.startswith("s3://"):
        parts = urlsplit(href)
        return f"https://{parts.netloc}.s3.amazonaws.com{parts.path}"
    if href.startswith("file://") and not is_url(base):
        href = unquote(urlsplit(href).path)
    target = str(make_absolute_href(href, base if is_url(base) else str(Path(base).absolute())))
    if is_url(base) and not is_url(target):
        raise ImageryError(f"a remote catalog points at {redact(href)}", where=redact(base))
    if "://" in target and not is_url(target):
        raise ImageryError(f"cannot read {redact(href)}", where=base, expected="a file or an http(s) URL")
    return target


# ---- signatures: the Planetary Computer's storage ---------------------------------------------
PLANETARY_COMPUTER = "planetary-computer"
_HOST = "planetarycomputer.microsoft.com"
_TOKENS_AT = "https://planetarycomputer.microsoft.com/api/sas/v1/token"
# A token lives about 45 minutes. One that is younger than half a minute was refused for another reason than
# its age: a new one would be refused, too.
_OLD_S, _YOUNG_S = 1800.0, 30.0
_token_lock = threading.Lock()
_tokens: dict[str, tuple[str, float]] = {}


def signer(signing: str | None) -> web.Signer | None:
    """The function that signs URLs of a source: `sign(url, fresh)`; None where nothing is signed."""
    return planetary_computer_sign if signing == PLANETARY_COMPUTER else None


def signing_of(catalog: str) -> str | None:
    """Who signs the URLs that a catalog gives, by its host."""
    host = urlsplit(catalog).hostname or ""
    return PLANETARY_COMPUTER if host == _HOST or host.endswith("." + _HOST) else None


def planetary_computer_sign(href: str, fresh: bool) -> str:
    """A Planetary Computer URL that may be read for some time; `fresh`: the last one was refused.

    Tokens are asked for by one thread at a time, from $PC_SDK_SAS_URL where that is set, with
    $PC_SDK_SUBSCRIPTION_KEY. Some containers may be read by anybody: where the token service fails, the URL
    is left as it is.
    """
    parts = urlsplit(href)
    account, _, rest = (parts.hostname or "").partition(".")
    if rest != "blob.core.windows.net" or account == "ai4edatasetspublicassets" or parts.query:
        return href
    container = f"{account}/{parts.path.lstrip('/').split('/', 1)[0]}"
    with _token_lock:
        token, made = _tokens.get(container, ("", -_OLD_S))
        age = time.monotonic() - made
        if age >= _OLD_S or (fresh and age > _YOUNG_S):
            address = f"{os.environ.get('PC_SDK_SAS_URL', _TOKENS_AT)}/{container}"
            key = os.environ.get("PC_SDK_SUBSCRIPTION_KEY")
            headers = {"Ocp-Apim-Subscription-Key": key} if key else None
            try:
                token = str(web.get(address, headers=headers, what="a signature").json()["token"])
            except (FetchError, ValueError, KeyError, TypeError) as error:
                log.warning("%s: no signature (%s); trying without one", host_of(href), error)
                return href
            _tokens[container] = token, time.monotonic()
    return f"{href}?{token}"
