"""The page's files and the view's data, without a browser."""

from __future__ import annotations

import re

from door import on_loop, open_door

from phloem.server import page


@on_loop
async def test_the_page_loads_nothing_from_elsewhere() -> None:
    async with open_door() as door:
        index = await door.http.get("/")
        assert index.status_code == 200 and index.headers["content-type"].startswith("text/html")
        policy = index.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        named = re.findall(r'(?:src|href)="(/[^"]*)"', index.text)
        assert "/playground/app.js" in named
        for path in {*named, *(f"/playground/{name}" for name in page.FILES)}:
            answer = await door.http.get(path)
            assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
            # The one address in them is the name of a language, and what Markdown takes for a link.
            addresses = set(re.findall(r"https?://[\w.]+", answer.text)) - {"http://www.w3.org"}
            assert not addresses, (path, addresses)
            assert "innerHTML" not in answer.text and "eval(" not in answer.text
        assert " style=" not in index.text and "onclick" not in index.text
        assert (await door.http.get("/playground/secret.txt")).status_code == 404
        assert (await door.http.get("/playground/..%2fapp.py")).status_code == 404


@on_loop
async def test_the_page_comes_without_a_key_and_its_data_does_not() -> None:
    async with open_door(api_key="secret") as door:
        assert (await door.http.get("/")).status_code == 200
        assert (await door.http.get("/playground/app.js")).status_code == 200
        for path in ("/playground/live", "/radix_tree", "/playground/secret.txt"):
            assert (await door.http.get(path)).status_code == 401, path
        answer = await door.http.get("/playground/live", headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200
