"""Every page links to what exists and holds no placeholder."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / 'README.md', REPO / 'CHANGELOG.md', *sorted((REPO / 'docs').glob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_and_placeholders(page):
    text = page.read_text(encoding='utf-8')
    targets = re.findall(r'\]\(([^)#\s]+)[^)]*\)', text)
    missing = [t for t in targets if '://' not in t and not (page.parent / t).exists()]
    assert not missing
    assert not re.search(r'<!-- \w+ -->\n<!-- end -->', text), 'a table has not been filled'
    assert not re.search(r'\b(SPEEDTABLE|TODO|TBD)\b', text)


def test_gallery_shows_all_of_its_pictures_and_they_are_small():
    pictures = {path.name: path.stat().st_size for path in (REPO / 'docs' / 'images' / 'gallery').iterdir()}
    assert set(re.findall(r'images/gallery/([\w.]+)', (REPO / 'docs' / 'gallery.md').read_text())) == set(pictures)
    assert max(pictures.values()) <= 250_000
    assert sum(pictures.values()) <= 2_500_000
