"""A page that shows what a model sees in an image: python tools/web_demo.py [CONFIG CHECKPOINT]... [--help].

Gradio draws the page and serves it, by default to this machine alone. What is on it comes from vheat_mm.apis.page.
"""

import argparse
import contextlib
import html
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]  # the repository, or vheat_mm/.mim of an installed package
PACKAGE = ROOT.parent if ROOT.name == '.mim' else ROOT / 'vheat_mm'
sys.path.append(str(PACKAGE.parent))  # if the package is not installed
# Else the network's threads wait in busy loops for the one whose core reads or paints: up to 40 times slower.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
# Signals are handled from now on, while torch is imported.
runpy.run_path(str(PACKAGE / 'utils' / 'process.py'))['prepare_start'](training=False)

from vheat_mm.apis.errors import run_reporting_errors  # noqa: E402
from vheat_mm.apis.inference.slicing import import_supervision  # noqa: E402
from vheat_mm.apis.page import HEAT, LOWEST, Model, Page, Shown  # noqa: E402
from vheat_mm.utils.errors import ToolError, describe  # noqa: E402

if TYPE_CHECKING:
    import gradio as gr

DEMOS = dict(  # folder of the results, and how to get them
    detection='`make demo` trains a detector',
    segmentation='`make demo-seg` a segmentor',
    classification='`make demo-cls` a classifier',
)
SAMPLES = 4
BEST = 'the most probable one'
WAITING = 16  # visitors' clicks
VISITORS = 32  # whose last prediction is kept, with its image
LOOPBACK = ('127.0.0.1', 'localhost', '::1')
CSS = """
#samples .grid-wrap { padding-top: 32px; }
#painted img, #heat img { width: 100%; height: 100%; object-fit: contain; }
#model input { text-overflow: ellipsis; padding-right: 2em; }
.message p { margin: 0; font-size: var(--text-md); }
.message .fault { border-left: 4px solid #dc2626; padding: 4px 12px; font-weight: 600; }
.results { overflow: auto; max-height: 420px; }
.results table { width: 100%; border-collapse: collapse; color: var(--body-text-color); font-size: var(--text-md); }
.results caption { text-align: left; padding-bottom: 6px; color: var(--body-text-color); }
.results table, .results thead, .results tbody, .results tr { border: 0 !important; }
.results th, .results td { padding: 4px 10px; text-align: right; border: 0 !important;
                           border-bottom: 1px solid var(--border-color-primary) !important; }
.results th:first-child, .results td:first-child { text-align: left; white-space: nowrap; }
@media (max-width: 480px) { .results th, .results td { padding: 4px 3px; font-size: var(--text-sm); } }
.swatch { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .5em;
          vertical-align: -.1em; border: 1px solid var(--body-text-color-subdued); }
"""


def say(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'


def say_fault(text: str) -> str:
    return f'<p class="fault" role="alert">{html.escape(text)}</p>'


def say_times(shown: Shown) -> str:
    height, width = shown.prediction.size
    times = ', '.join(f'{name} {1000 * seconds:.0f} ms' for name, seconds in shown.seconds.items())
    return say(f'{width} x {height} pixels: {times}')


def build(page: Page, samples: Sequence[Path], limits: str) -> 'gr.Blocks':
    """The page in Gradio's components."""
    import gradio as gr
    from gradio import processing_utils

    async def refuse_download(url: str, cache_dir: str) -> str:
        raise gr.Error('Addresses are not fetched; upload the file.')

    # It has no switch: a visitor may send an address in place of a file, which Gradio would fetch.
    processing_utils.async_ssrf_protected_download = refuse_download
    gr.Slider.preprocess = lambda _, typed: typed  # Gradio's raises an error for a number that is out of range
    first = next(iter(page.models))

    def fault(text: str) -> tuple:
        off = gr.DownloadButton(interactive=False)
        return None, None, say_fault(text), '', off, off, None

    def results(shown: Shown, score_thr: float | None, opacity: float | None) -> tuple:
        score_thr, opacity = min(max(score_thr or 0, LOWEST), 1), min(max(opacity or 0, 0), 1)
        painted = page.paint(shown, score_thr, opacity)
        image, coco = page.save(shown, painted, score_thr)
        return (
            image,
            say_times(shown),
            page.table(shown, score_thr),
            gr.DownloadButton(value=image, interactive=True),
            gr.DownloadButton(value=coco, interactive=coco is not None),
        )

    def on_predict(name: str, upload: dict[str, Any] | None, score_thr: float, opacity: float) -> tuple:
        if upload is None:
            return fault('Choose an image first.')
        try:
            shown = page.predict(name, upload['path'])
        except ToolError as error:
            return fault(str(error))
        return shown, *results(shown, score_thr, opacity), None

    def on_slider(shown: Shown | None, score_thr: float, opacity: float) -> tuple:
        return (gr.skip(),) * 5 if shown is None else results(shown, score_thr, opacity)

    def on_draw(shown: Shown | None, kind: str, target: str) -> tuple:
        if shown is None:
            return None, say_fault('Press Predict first.')
        try:
            return page.heat(shown, kind, None if target == BEST else target), say(HEAT[kind].text)
        except ToolError as error:
            return None, say_fault(str(error))

    def on_sample(event: gr.SelectData) -> str:
        return str(samples[event.index])

    def on_model(name: str) -> tuple:
        model = page.models[name]
        detector, classifier = model.predictor.task == 'detection', model.predictor.task == 'classification'
        return (
            gr.Slider(value=model.score_thr, visible=detector),
            gr.Slider(visible=not classifier),
            gr.DownloadButton(visible=detector),
            gr.Dropdown([BEST, *model.predictor.classes], value=BEST),
        )

    with gr.Blocks(title='vHeat', delete_cache=(600, 3600), analytics_enabled=False) as blocks:
        shown = gr.State(None, time_to_live=3600)
        gr.Markdown('# vHeat on your images\nNothing leaves the machine that serves this page.')
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                model = gr.Dropdown(list(page.models), value=first, label='Task and model', elem_id='model')
                upload = gr.Image(
                    label=f'Image ({limits})',
                    sources=['upload', 'webcam', 'clipboard'],
                    height=300,
                    webcam_options=gr.WebcamOptions(mirror=False),
                    buttons=[],
                    elem_id='upload',
                )
                gallery = gr.Gallery(
                    [str(path) for path in samples],
                    label='Samples',
                    columns=SAMPLES,
                    height=160,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=bool(samples),
                    elem_id='samples',
                )
                button = gr.Button('Predict', variant='primary')
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab('Prediction'):
                    painted = gr.Image(
                        label='Painted prediction',
                        show_label=False,  # it would cover the picture's corner
                        alt_text='the image with what the model found painted over it',
                        interactive=False,
                        height='min(480px, 100vw)',
                        buttons=['fullscreen'],
                        elem_id='painted',
                    )
                    message = gr.HTML(say('Choose an image, then press Predict.'), elem_classes='message')
                    with gr.Row():
                        score_thr = gr.Slider(
                            LOWEST, 1, page.models[first].score_thr, step=0.01, label='Score threshold'
                        )
                        opacity = gr.Slider(0, 1, 0.5, step=0.05, label='Mask opacity')
                    table = gr.HTML('', elem_classes='results', elem_id='results')
                    with gr.Row():
                        image_file = gr.DownloadButton('Painted image (PNG)', interactive=False)
                        coco_file = gr.DownloadButton('Detections (COCO JSON)', interactive=False)

                with gr.Tab('Heat'):
                    kind = gr.Radio(list(HEAT), value=next(iter(HEAT)), label='Picture')
                    target = gr.Dropdown([BEST], value=BEST, label='Class')
                    draw = gr.Button('Draw')
                    heat = gr.Image(
                        show_label=False,
                        alt_text='the picture of heat',
                        interactive=False,
                        buttons=['fullscreen', 'download'],
                        elem_id='heat',
                    )
                    heat_message = gr.HTML('', elem_classes='message')

        outputs = [painted, message, table, image_file, coco_file]
        private = dict(api_visibility='private')
        button.click(
            on_predict,
            [model, upload, score_thr, opacity],
            [shown, *outputs, heat],
            concurrency_id='network',
            concurrency_limit=1,
            show_progress_on=painted,
            preprocess=False,  # Gradio would decode the image, whatever its size
            **private,
        )
        gr.on(
            [score_thr.input, opacity.input],
            on_slider,
            [shown, score_thr, opacity],
            outputs,
            trigger_mode='always_last',
            show_progress='hidden',
            **private,
        )
        draw.click(
            on_draw,
            [shown, kind, target],
            [heat, heat_message],
            concurrency_id='network',
            show_progress_on=heat,
            **private,
        )
        kind.change(
            lambda name: gr.Dropdown(visible=HEAT[name].of_class), kind, target, show_progress='hidden', **private
        )
        gallery.select(on_sample, None, upload, show_progress='hidden', **private)
        gr.on([model.change, blocks.load], on_model, model, [score_thr, opacity, coco_file, target], **private)
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1)


def find_demos(folder: Path) -> list[tuple[str, str]]:
    """Configs and newest checkpoints that the demos have left.

    Raises:
        ToolError: There is none.
    """
    found = []
    for train in (folder / task / 'train' for task in DEMOS):
        configs, last = sorted(train.glob('*.py')), train / 'last_checkpoint'
        # The folder may have been moved since MMEngine wrote the path.
        checkpoint = train / Path(last.read_text().strip()).name if last.is_file() else last
        if configs and checkpoint.is_file():
            found.append((str(configs[0]), str(checkpoint)))
    if not found:
        raise ToolError(
            f'no trained demo below {folder}: {", ".join(DEMOS.values())}; or name a model of yours: '
            'tools/web_demo.py CONFIG CHECKPOINT'
        )
    return found


def find_samples(demo: Path, folder: Path) -> list[Path]:
    """Images to try: of the demo's validation set, or else photographs of scikit-image, written into ``folder``."""
    if found := sorted((demo / 'data' / 'coco' / 'val').glob('*.jpg'))[:SAMPLES]:
        return found
    with contextlib.suppress(ImportError):
        from PIL import Image
        from skimage import data

        for name in ('coins', 'astronaut', 'coffee', 'chelsea'):
            path = folder / f'{name}.png'
            Image.fromarray(getattr(data, name)()).save(path)
            found.append(path)
    return found


def check_port(host: str, port: int) -> None:
    """Before the models are loaded, which takes seconds.

    Raises:
        ToolError: The port is taken, or the host is none of this machine.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            remedy = 'choose another --port, or --host 127.0.0.1, which is this machine alone'
            raise ToolError(f'cannot serve on port {port} of {host}: {describe(error)}; {remedy}') from error


def serve(args: argparse.Namespace) -> None:
    """Show the page until it is interrupted.

    Raises:
        ToolError: Gradio is not installed, no model, the port is taken.
    """
    if len(args.models) % 2:
        raise ToolError(f'{args.models[-1]!r} has no partner: models are pairs of CONFIG CHECKPOINT')
    check_port(args.host, args.port)
    pairs = list(zip(args.models[::2], args.models[1::2], strict=True)) or find_demos(args.demo)
    with tempfile.TemporaryDirectory(prefix='vheat_page_') as folder:
        # Before gradio is imported, which reads them.
        os.environ.update(GRADIO_ANALYTICS_ENABLED='False', GRADIO_TEMP_DIR=folder, MPLBACKEND='Agg')
        for name in ('NO_PROXY', 'no_proxy'):  # Gradio asks its own server whether it runs
            os.environ[name] = ','.join(filter(None, [os.environ.get(name), *LOOPBACK, args.host]))
        try:
            import gradio as gr
        except ModuleNotFoundError as error:
            raise ToolError(f"tools/web_demo.py needs {error.name}: pip install 'vheat_mm[page]'") from error
        import_supervision('to paint')

        models = {}
        for config, checkpoint in pairs:
            model = Model(config, checkpoint, args.device, args.max_pixels)
            name = f'{model.predictor.task}: {Path(config).stem}'
            models[name if name not in models else f'{name} ({checkpoint})'] = model
        samples = find_samples(args.demo, Path(folder))
        blocks = build(Page(models, Path(folder)), samples, f'up to {args.max_mb} MB')
        blocks.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            ssr_mode=False,
            max_file_size=f'{args.max_mb}mb',
            state_session_capacity=VISITORS,
            footer_links=[],
            run_history=False,
            i18n=gr.I18n(en={'common.complete': 'complete'}),  # which Gradio's own lacks
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            css=CSS,
            theme=gr.themes.Default(
                primary_hue='orange', font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']
            ),
        )
        print(f'page: http://{args.host}:{args.port} (Ctrl-C ends it)', flush=True)
        if args.host not in LOOPBACK:
            print(f'every machine that reaches {args.host} can use this page and its models', flush=True)
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the files are removed then, too
            while True:
                time.sleep(3600)
        finally:
            blocks.close(verbose=False)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Show predictions and pictures of heat on a page in the browser.')
    parser.add_argument(
        'models', nargs='*', metavar='CONFIG CHECKPOINT', help='models to choose from (default: those of the demos)'
    )
    parser.add_argument('--port', type=int, default=7860, help='port of the page (default: 7860)')
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 lets other machines in (default: 127.0.0.1)')
    parser.add_argument('--device', help='cpu, cuda:0, ... (default: a GPU if there is one)')
    parser.add_argument('--max-mb', type=int, default=20, help='size of an uploaded file in MB (default: 20)')
    parser.add_argument(
        '--max-pixels', type=int, default=50_000_000, help='pixels of an image, by its header (default: 50 million)'
    )
    parser.add_argument('--demo', type=Path, default=Path('demo_out'), help="folder of the demos' results")
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(run_reporting_errors(lambda: serve(parse_args())))
