"""Download the image of a sample that has only its URL and its sha256."""

import hashlib
import http.client
import json
import urllib.request

from dr.sample import BadSample

from .http import bounded_opener

TIMEOUT = 10  # seconds that a server may be silent; the whole image may take three times as long
MAX_BYTES = 2**25  # of an image as downloaded
USER_AGENT = (
    "Mozilla/5.0 (compatible; clip-dataset-reinforcement/0.1; "
    "+https://huggingface.co/datasets/apple/DataCompDR-12M)"
)


def fetch_image(members: dict[str, bytes]) -> bytes:
    """Download the image at a sample's ``url.txt``, the same bytes that the teachers embedded.

    Raises:
        BadSample: the sample has no URL or no sha256, the link is dead, or the image has
            changed; crop boxes and embeddings belong to no other image.
    """
    try:
        url = members["url.txt"].decode("utf-8-sig").strip()
        expected = json.loads(members["json"])["sha256"]
        if not url or not isinstance(expected, str):
            raise ValueError(f"URL {url!r}, sha256 {expected!r}"[:200])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise BadSample("no image, and no URL (url.txt) with sha256 (json)", detail) from error
    try:
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
        with bounded_opener(MAX_BYTES, 3 * TIMEOUT).open(request, timeout=TIMEOUT) as response:
            data = response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BadSample("dead link", f"{url}: {str(error) or type(error).__name__}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected.lower():
        detail = f"{url}: found sha256 {found[:8]}…, expected {expected[:8]}…"
        raise BadSample("changed image", detail)
    return data
