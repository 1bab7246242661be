"""The page in headless Chromium: it shows what Predictor and its writers give, and nothing leaves the machine."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tool_runs import REPO, TOOLS, clean_environment
from trained_models import CLASSES, CLASSIFIER, DETECTOR, write

from vheat_mm.apis.inference import Predictor
from vheat_mm.apis.inference.coco import to_coco
from vheat_mm.apis.inference.painting import paint
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
for library in ('mmdet.apis', 'mmpretrain', 'gradio', 'supervision'):
    pytest.importorskip(library)
sync_api = pytest.importorskip('playwright.sync_api')
from PIL import Image  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402

pytestmark = pytest.mark.usefixtures('own_scope')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ('--disable-gpu', '--disable-quic', '--no-first-run', '--disable-component-update', '--disable-sync')
MAX_MB = 1
# Lines in the server's log for every address that it looks up or connects to.
AUDIT = """
import os, sys
def audit(event, arguments):
    if event in ('socket.connect', 'socket.sendto'):
        os.write(2, f'CONNECTS {arguments[1]}\\n'.encode())
    if event == 'socket.getaddrinfo':
        os.write(2, f'LOOKS UP {arguments[0]}\\n'.encode())
sys.addaudithook(audit)
"""


# Collects Gradio's names of texts that the page shows in place of the texts.
WATCH = r"""
window.keys = [];
new MutationObserver(() => keys.push(...(document.body?.innerText.match(/common\.\w+/g) ?? [])))
    .observe(document, {subtree: true, childList: true, characterData: true});
"""


class Server(NamedTuple):
    """The page as served, and the models and pictures to compare it with."""

    address: str
    log: Path
    detector: tuple[str, str]
    images: list[Path]


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """A page with a detector and a classifier, which ends by Ctrl-C and leaves no file."""
    if CHROMIUM is None:
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)('no Chromium: .dev_scripts/setup_browser.sh')
    folder = tmp_path_factory.mktemp('page')
    for name in ('audit', 'detector', 'classifier', 'tmp'):
        (folder / name).mkdir()
    (folder / 'audit' / 'sitecustomize.py').write_text(AUDIT)
    torch.manual_seed(0)
    pipeline = "test_pipeline = _base_.test_pipeline\ntest_pipeline[1]['scale'] = (96, 64)\n"
    pipeline += 'test_dataloader = dict(dataset=dict(pipeline=test_pipeline))'
    detector = write(folder / 'detector', *DETECTOR, pipeline)
    checkpoint = torch.load(detector[1], weights_only=False)
    checkpoint['state_dict']['roi_head.bbox_head.fc_cls.weight'] *= 100  # scores that differ
    torch.save(checkpoint, detector[1])
    classifier = write(folder / 'classifier', *CLASSIFIER)
    images = []
    for index in range(2):
        small = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        images.append(folder / f'photograph-{index}.png')
        Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC).save(images[-1])

    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    options = ['--port', str(port), '--max-mb', str(MAX_MB), '--demo', folder / 'none', '--device', 'cpu']
    log, path = folder / 'server.log', os.pathsep.join([str(folder / 'audit'), str(REPO)])
    with log.open('w') as file:
        process = subprocess.Popen(
            [sys.executable, TOOLS / 'web_demo.py', *detector, *classifier, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=clean_environment(OMP_NUM_THREADS='1', PYTHONPATH=path, TMPDIR=str(folder / 'tmp')),
        )
    try:
        while 'page: http' not in log.read_text():
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(log.read_text())
        yield Server(f'http://127.0.0.1:{port}', log, detector, images)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130), log.read_text()
        assert not [*(folder / 'tmp').glob('vheat_page_*')]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def tool(monkeypatch):
    """tools/web_demo.py as a module."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    spec = importlib.util.spec_from_file_location('web_demo', TOOLS / 'web_demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    signal.signal(signal.SIGINT, before)
    return module


@pytest.fixture(scope='module')
def browser(server):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', *FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def visit(server, browser):
    """Open the page as another visitor; all that a visitor's browser requests stays on this machine."""
    contexts, addresses = [], []

    def open_page():
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.add_init_script(WATCH)
        page.set_default_timeout(20_000)
        page.on('request', lambda request: addresses.append(request.url))
        page.goto(server.address)
        page.get_by_role('button', name='Predict').wait_for()
        return page

    yield open_page
    keys = [page.evaluate('window.keys') for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    print(server.log.read_text())  # pytest shows it of a test that has failed
    assert addresses
    assert not any(keys)
    assert not [name for name in addresses if not name.startswith((server.address, 'data:', 'blob:'))]


def upload(page, path: Path) -> None:
    page.locator('#upload input[type=file]').first.set_input_files(path)
    page.locator('#upload img').wait_for()


def predict(page) -> None:
    page.get_by_role('button', name='Predict').click()
    page.locator('#results table').wait_for()


def shown(page, where: str = '#painted', other_than: str = '') -> tuple[str, np.ndarray]:
    """Address and pixels (height, width, 3), in BGR order, of the picture that is shown."""
    picture = page.locator(f'{where} img')
    sync_api.expect(picture).not_to_have_attribute('src', other_than)
    address = picture.get_attribute('src')
    content = page.request.get(address).body()
    return address, np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))[..., ::-1]


class Expected:
    """What Predictor and the writers give for an image."""

    def __init__(self, server: Server) -> None:
        self.predictor = Predictor(*server.detector, device='cpu', score_thr=0.05)

    def predict(self, path: Path):
        (prediction,) = self.predictor(path)
        return prediction

    def paint(self, path: Path, score_thr: float = 0.3, opacity: float = 0.5) -> np.ndarray:
        return paint(self.predict(path), CLASSES['classes'], CLASSES['palette'], score_thr, opacity)


@pytest.fixture(scope='module')
def expected(server):
    return Expected(server)


def test_an_upload_is_painted_listed_and_downloaded(server, visit, expected):
    page, path = visit(), server.images[0]
    upload(page, path)
    predict(page)
    np.testing.assert_array_equal(shown(page)[1], expected.paint(path))
    found = expected.predict(path)
    kept = found.scores >= 0.3
    assert kept.any()
    rows = page.locator('#results tbody tr').all_inner_texts()
    assert [row.split()[:2] for row in rows] == [
        [CLASSES['classes'][label], f'{score:.3f}'] for label, score in zip(found.labels, found.scores, strict=True)
    ][: kept.sum()]
    for step in ('reading', 'network', 'painting'):
        sync_api.expect(page.get_by_role('status').filter(has_text=step)).to_be_visible()

    with page.expect_download() as download:
        page.get_by_role('button', name='Detections (COCO JSON)').click()
    assert download.value.suggested_filename == 'photograph-0_coco.json'
    coco = COCO(download.value.path())
    (image,) = coco.dataset['images']
    assert image['file_name'] == path.name
    assert coco.dataset == to_coco([found], CLASSES['classes'], 0.3) | dict(info=coco.dataset['info'])
    with page.expect_download() as download:
        page.get_by_role('button', name='Painted image (PNG)').click()
    with Image.open(download.value.path()) as picture:
        np.testing.assert_array_equal(np.asarray(picture)[..., ::-1], expected.paint(path))


def test_sliders_paint_again_without_the_network(server, visit, expected):
    page, path = visit(), server.images[0]
    upload(page, path)
    predict(page)
    address, _ = shown(page)
    times = page.get_by_role('status').filter(has_text='network').inner_text().rpartition(', painting')[0]
    page.get_by_label('range slider for Mask opacity').fill('0.9')
    address, painted = shown(page, other_than=address)
    np.testing.assert_array_equal(painted, expected.paint(path, opacity=0.9))
    scores = np.sort(expected.predict(path).scores)
    threshold = round(float(scores[len(scores) // 2]), 2)
    page.get_by_label('range slider for Score threshold').fill(str(threshold))
    address, painted = shown(page, other_than=address)
    np.testing.assert_array_equal(painted, expected.paint(path, threshold, 0.9))
    sync_api.expect(page.locator('#results tbody tr')).to_have_count(int((scores >= threshold).sum()))
    assert page.get_by_role('status').filter(has_text='network').inner_text().startswith(times)
    page.get_by_label('number input for Score threshold').fill('7')
    page.get_by_label('number input for Score threshold').press('Enter')
    _, painted = shown(page, other_than=address)
    np.testing.assert_array_equal(painted, expected.paint(path, 1, 0.9))
    assert 'Traceback' not in server.log.read_text()


def test_two_visitors_at_once(server, visit, expected):
    pages = [visit(), visit()]
    for page, path in zip(pages, server.images, strict=True):
        upload(page, path)
    for page in pages:
        page.get_by_role('button', name='Predict').click()
    addresses = []
    for page, path in zip(pages, server.images, strict=True):
        page.locator('#results table').wait_for()
        addresses.append(shown(page)[0])
        np.testing.assert_array_equal(shown(page)[1], expected.paint(path))
    for page in pages:  # each keeps its own prediction
        page.get_by_label('range slider for Mask opacity').fill('0.1')
    for page, path, address in zip(pages, server.images, addresses, strict=True):
        np.testing.assert_array_equal(shown(page, other_than=address)[1], expected.paint(path, opacity=0.1))


def write_small_png(path: Path, side: int) -> None:
    """A file of a few bytes whose header says that it is a square image of this many pixels."""
    chunks = (b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)), (b'IDAT', zlib.compress(bytes(9)))
    parts = (
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(parts))


def test_bad_files_are_answered_with_a_sentence(server, visit, expected, tmp_path):
    text, huge, large = tmp_path / 'text.jpg', tmp_path / 'huge.png', tmp_path / 'large.png'
    text.write_text('no image')
    write_small_png(huge, 60000)
    large.write_bytes(server.images[0].read_bytes() + bytes(MAX_MB * 2**20))
    page = visit()
    button, alert = page.get_by_role('button', name='Predict'), page.get_by_role('alert')
    button.click()
    sync_api.expect(alert).to_have_text('Choose an image first.')
    for path, words in ((text, 'text.jpg'), (huge, '60000 x 60000')):
        page.locator('#upload input[type=file]').first.set_input_files(path)
        page.get_by_role('button', name='Remove Image').wait_for()
        button.click()
        sync_api.expect(alert).to_contain_text(words, timeout=20_000)
        sync_api.expect(page.locator('#painted img')).to_have_count(0)
        page.get_by_role('button', name='Remove Image').click()
    page.locator('#upload input[type=file]').first.set_input_files(large)
    sync_api.expect(page.get_by_text('exceed the maximum allowed size')).to_be_visible()
    page.reload()
    upload(page, server.images[1])  # all is well afterwards
    predict(page)
    np.testing.assert_array_equal(shown(page)[1], expected.paint(server.images[1]))


def test_the_other_model_and_the_heat_tab(server, visit):
    page = visit()
    page.get_by_label('Task and model').click()
    page.get_by_role('option', name='classification').click()
    sync_api.expect(page.get_by_label('range slider for Score threshold')).to_be_hidden()
    page.get_by_role('tab', name='Heat').click()
    page.get_by_role('button', name='Draw').click()
    sync_api.expect(page.get_by_role('alert')).to_have_text('Press Predict first.')
    page.get_by_role('tab', name='Prediction').click()
    upload(page, server.images[0])
    predict(page)
    sync_api.expect(page.locator('#results tbody tr')).to_have_count(2)
    page.get_by_role('tab', name='Heat').click()
    address = ''
    for kind in page.get_by_role('radio').all():
        kind.check()
        sync_api.expect(page.get_by_label('Class', exact=True)).to_be_visible(visible=kind.input_value() == 'Grad-CAM')
        page.get_by_role('button', name='Draw').click()
        address, picture = shown(page, '#heat', address)
        assert picture.shape[1] == 1280
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_visitors_get_no_other_files_and_the_server_connects_to_itself_alone(server, visit):
    page = visit()
    # A visitor sends an address or a file of the server in place of an upload.
    address, own, mark = 'http://192.0.2.1/image.png', str(server.images[0]), dict(meta={'_type': 'gradio.FileData'})
    config = page.request.get(f'{server.address}/config').json()
    call = next(call for call in config['dependencies'] if len(call['inputs']) == 4)
    (name,) = (part['props']['value'] for part in config['components'] if part['props'].get('elem_id') == 'model')
    for file, words in (
        (dict(path=address, **mark), 'Addresses are not fetched'),
        (dict(path=address), 'image.png has not been uploaded'),
        (dict(path=own, **mark), 'not uploaded by a user'),
        (dict(path=own), 'photograph-0.png has not been uploaded'),
    ):
        data = dict(fn_index=call['id'], session_hash='visitor', data=[name, file, 0.5, 0.5])
        assert page.request.post(f'{server.address}/gradio_api/queue/join', data=data).ok
        assert words in page.request.get(f'{server.address}/gradio_api/queue/data?session_hash=visitor').text()
    lines = [line for line in server.log.read_text().splitlines() if line.startswith(('CONNECTS', 'LOOKS UP'))]
    assert lines
    assert not [line for line in lines if '127.0.0.1' not in line]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--port', '{port}'], 'cannot serve on port {port} of 127.0.0.1: .* in use; choose another --port'),
        (['--port', '0', '--host', '192.0.2.1'], '--host 127.0.0.1, which is this machine alone'),
        (['--port', '0', '--demo', '{folder}'], 'no trained demo below {folder}: `make demo` trains a detector'),
        (['--port', '0', 'config.py'], "'config.py' has no partner"),
    ],
)
def test_messages_before_the_page(server, tool, tmp_path, arguments, message):
    names = dict(port=server.address.rpartition(':')[2], folder=tmp_path)
    args = tool.parse_args([argument.format(**names) for argument in arguments])
    with pytest.raises(ToolError, match=message.format(**names)):
        tool.serve(args)


def test_gradio_is_missing(server, tool, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ToolError, match=r"needs gradio: pip install 'vheat_mm\[page\]'"):
        tool.serve(tool.parse_args([*server.detector, '--port', '0']))
