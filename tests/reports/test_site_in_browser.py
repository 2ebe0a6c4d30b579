"""The real site, built by npm from the synthetic warehouse and opened in a real browser."""

import shutil
from pathlib import Path

import pytest

from dbt_reports.site import build_site
from diffing_core.warehouse import FILE
from tests.reports.browser import chromium, look, served

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine; on Debian: apt-get install chromium")


@pytest.fixture(scope="module")
def site(reports_home: Path, pytestconfig: pytest.Config) -> Path:
    """The built site; npm's packages are kept in pytest's cache."""
    home = pytestconfig.cache.mkdir("site")
    shutil.copyfile(reports_home / FILE, home / FILE)
    return build_site(home, lambda line: None)


@pytest.mark.timeout(1200)
def test_a_person_sees_results_and_untrusted_text_stays_text(site: Path) -> None:
    with served(site) as url:
        front = look(url)
        organism = look(f"{url}/organisms/cake_bake/")
    assert "which method found it" in front.html
    assert "[0." in front.html, "no interval beside a rate"
    assert "identified" in front.html
    assert "&lt;script&gt;" in organism.html
    assert "<img src=x" not in organism.html
    assert front.hosts | organism.hosts == {"127.0.0.1"}
