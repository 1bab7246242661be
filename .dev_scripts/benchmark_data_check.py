"""Time and memory of ``tools/misc/check_dataset.py`` on a generated data set of COCO's size.

    python .dev_scripts/benchmark_data_check.py --out work_dirs/data_check

Writes a COCO file of ``--images`` images with 7.3 annotations each, one in 90 an RLE, as ``instances_train2017.json``
has, and as many links to a few JPEGs of 640 x 480. The check runs twice: reading annotations alone, then everything.
Linux only: other systems count memory in other units.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / 'tools' / 'analysis_tools'))


CLASSES, ANNOTATIONS_PER_IMAGE, RLE_EVERY, JPEGS = 80, 7.27, 90, 50
HEIGHT, WIDTH = 480, 640
CONFIG = """
_base_ = {base!r}
metainfo = dict(classes=tuple(f'class {{i}}' for i in range({classes})))
train_dataloader = dict(dataset=dict(
    metainfo=metainfo, data_root={root!r}, ann_file='coco.json', data_prefix=dict(img='images/')))
"""


def make_data(root: Path, images: int) -> None:
    """Write the data set; its JPEGs are about as large as photographs of their size."""
    rng = np.random.default_rng(0)
    (root / 'images').mkdir(parents=True)
    for i in range(JPEGS):
        rough = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
        image = cv2.resize(rough, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / f'{i}.jpg'), image, [cv2.IMWRITE_JPEG_QUALITY, 70])
    entries, annotations = [], []
    for i in range(images):
        name = f'{i:012}.jpg'
        (root / 'images' / name).symlink_to(root / f'{i % JPEGS}.jpg')
        entries.append(dict(id=i, file_name=name, height=HEIGHT, width=WIDTH))
    for i in range(round(images * ANNOTATIONS_PER_IMAGE)):
        x, y = (float(v) for v in rng.integers(0, 300, 2))
        w, h = (float(v) for v in rng.integers(10, 150, 2))
        angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        outline = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], axis=1)
        segmentation: object = [outline.round(2).ravel().tolist()]
        if crowd := i % RLE_EVERY == 0:
            start, size = int(x) * HEIGHT + int(y), int(h)
            segmentation = dict(size=[HEIGHT, WIDTH], counts=[start, size, HEIGHT * WIDTH - start - size])
        box = dict(area=w * h, bbox=[x, y, w, h], segmentation=segmentation)
        annotations.append(dict(id=i, image_id=i % images, category_id=i % CLASSES, iscrowd=int(crowd), **box))
    categories = [dict(id=i, name=f'class {i}') for i in range(CLASSES)]
    text = json.dumps(dict(images=entries, annotations=annotations, categories=categories))
    (root / 'coco.json').write_text(text)
    size = np.mean([(root / f'{i}.jpg').stat().st_size for i in range(JPEGS)])
    print(f'{images} images of {size / 1e3:.0f} kB, {len(annotations)} annotations, {len(text) / 1e6:.0f} MB of JSON')


def measure(command: list[str]) -> tuple[float, float, float]:
    """Run a command; returns seconds, CPU seconds, and the peak memory of its largest process in GB."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f'{" ".join(command)}: status {os.waitstatus_to_exitcode(status)}')
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=118287)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/data_check'), help='a new folder for the data')
    args = parser.parse_args()
    root = args.out.absolute()
    if root.exists():
        parser.error(f'--out {args.out} exists: name a new folder')
    maker = multiprocessing.Process(target=make_data, args=(root, args.images))
    maker.start()  # the system counts this process's memory as that of the processes it starts
    maker.join()
    base = str(REPO / 'configs/detection/mask-rcnn_vheat-t_fpn_1x_coco.py')
    config = root / 'config.py'
    config.write_text(CONFIG.format(base=base, classes=CLASSES, root=str(root)))
    check = [sys.executable, str(REPO / 'tools/misc/check_dataset.py'), str(config), '--split', 'train']
    for name, command in (('annotations', [*check, '--limit', '1']), ('everything', check)):
        seconds, busy, peak = measure(command)
        print(f'{name}: {seconds:.0f} s, {busy:.0f} s of CPU time, peak {peak:.2f} GB', flush=True)


if __name__ == '__main__':
    main()
