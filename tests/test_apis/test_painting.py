"""Painted images and videos, and label maps, as other libraries read them."""

import errno
import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from fake_predictions import CLASSES, PALETTE, detection

from vheat_mm.apis.inference.label_maps import LabelMapWriter
from vheat_mm.apis.inference.painting import PaintedWriter, _Look, displayable, paint
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.apis.inference.video import VideoWriter
from vheat_mm.utils.errors import ToolError

cv2 = pytest.importorskip('cv2')


class TestPaint:
    @pytest.fixture(autouse=True)
    def _needs_supervision(self):
        pytest.importorskip('supervision')

    def test_detections_change_their_places_alone(self):
        """Lines of boxes, masks, and labels above the boxes; the box below the threshold leaves no trace."""
        mask_of = pytest.importorskip('pycocotools.mask')
        prediction = detection(size=(300, 400))
        prediction.boxes = prediction.boxes * 5
        before = prediction.image.copy()
        painted = paint(prediction, CLASSES, PALETTE, score_thr=0.3, opacity=0.25)
        np.testing.assert_array_equal(prediction.image, before)
        changed = np.abs(painted.astype(int) - before).max(axis=2) > 1
        allowed = np.zeros(changed.shape, bool)
        for (x1, y1, x2, y2), mask, label in zip(
            prediction.boxes.astype(int), prediction.masks, prediction.labels[:2], strict=False
        ):
            inside = mask_of.decode(mask).astype(bool)
            colour = np.array(PALETTE[label])[::-1]
            np.testing.assert_allclose(painted[inside], np.tile(0.75 * 100 + 0.25 * colour, (inside.sum(), 1)), atol=1)
            around = np.zeros_like(allowed)
            around[y1 - 1 : y2 + 2, x1 - 1 : x2 + 2] = True
            around[y1 + 2 : y2 - 1, x1 + 2 : x2 - 1] = False
            assert (painted[y1, (x1 + x2) // 2] == colour).all()
            label_place = np.zeros_like(allowed)
            label_place[y1 - 20 : y1 + 2, x1 : x1 + 80] = True
            assert changed[label_place].mean() > 0.2
            allowed |= inside | around | label_place
        assert not (changed & ~allowed).any()

    def test_boxes_beyond_the_image(self):
        prediction = detection(with_masks=False)
        prediction.boxes = np.array([[-1e12, 10, 1e12, 50], [0, -5, 1, 1], [70, 50, 60, 40]], np.float32)
        painted = paint(prediction, ['two\nlines', ''], PALETTE)
        for row in (10, 50):
            assert (painted[row] == np.array(PALETTE[1])[::-1]).all()

    def test_labels_stay_inside(self):
        prediction = detection(size=(300, 400), with_masks=False)
        prediction.boxes = np.array([[50, 0, 200, 100]] * 3, np.float32)
        painted = paint(prediction, CLASSES, PALETTE, 0.7)
        assert (painted[2:12, 53:90] == np.array(PALETTE[1])[::-1]).all(axis=2).mean() > 0.3  # the label's ground

    def test_small_images_have_no_labels(self):
        pytest.importorskip('pycocotools')
        prediction = detection()
        painted = paint(prediction, ['a very long name'] * 2, PALETTE, 0.3)
        assert (painted[:18] == 100).all()

    def test_label_map_is_blended_by_class(self):
        label_map = np.array([[0, 1], [255, 0]], np.uint8).repeat(100, 0).repeat(100, 1)
        image = np.full((200, 200, 3), 60, np.uint8)
        painted = paint(
            Prediction(Item('a', 'a', 0, 'a'), image=image, size=(200, 200), task='segmentation', label_map=label_map),
            CLASSES,
            PALETTE,
            opacity=0.5,
        )
        for place, label in (((150, 150), 0), ((40, 150), 1)):
            np.testing.assert_allclose(painted[place], 30 + np.array(PALETTE[label])[::-1] / 2, atol=1)
        assert (painted[150, 50] == 60).all()  # not labelled

    def test_classes_are_listed(self):
        """The longest bar has the best class's colour and the length of its score."""
        image = np.full((40, 400, 3), 255, np.uint8)
        scores = np.array([0.25, 0.75], np.float32)
        prediction = Prediction(
            Item('a', 'a', 0, 'a'), image=image, size=(40, 400), task='classification', scores=scores
        )
        painted = paint(prediction, CLASSES, PALETTE)
        assert painted.shape == (160, 1600, 3)  # enlarged until the text is readable
        lengths = [(painted == np.array(colour)[::-1]).all(axis=2).sum(axis=1).max() for colour in PALETTE]
        assert lengths[1] == pytest.approx(3 * lengths[0], abs=3)
        assert (painted[80:] == 255).all()

    @pytest.mark.parametrize('shape', [(40, 50), (40, 50, 1), (40, 50, 8)])
    def test_other_bands(self, shape):
        image = np.linspace(0, 40_000, int(np.prod(shape))).reshape(shape).astype(np.uint16)
        shown = displayable(image)
        assert shown.shape == (40, 50, 3)
        assert shown.dtype == np.uint8
        assert (shown.min(), shown.max()) == (0, 255)
        assert np.corrcoef(shown[..., 0].ravel(), image.reshape(40, 50, -1)[..., 0].ravel())[0, 1] > 0.99

    def test_names_that_no_font_has(self, monkeypatch):
        """Latin-1 is drawn; characters that no font has give the class's number, not frames."""
        font_manager = pytest.importorskip('matplotlib.font_manager')
        fonts = font_manager.fontManager.ttflist
        monkeypatch.setattr(font_manager.fontManager, 'ttflist', [font for font in fonts if 'Last' in font.name])
        look = _Look(('Nüßchen é', '\U000f0000'), PALETTE, 12)
        assert [look.name(label) for label in range(3)] == ['Nüßchen é', 'class 1', 'class 2']
        assert Path(look.font_path()).name == 'DejaVuSans.ttf'


class TestPaintedWriter:
    @pytest.fixture
    def writer(self, tmp_path):
        pytest.importorskip('supervision')
        return PaintedWriter(tmp_path, lambda item: item.name, CLASSES, PALETTE)

    def frames(self, count, size=(97, 131), **changes):
        for frame in range(count):
            image = np.tile(np.array([10, 40, 230] if frame % 2 else [200, 90, 30], np.uint8), (*size, 1))
            last = frame == count - 1
            yield detection('in/clip.mp4', frame=frame, fps=29.97, last=last, size=size, image=image, **changes)

    def test_images(self, writer, tmp_path):
        image_of = pytest.importorskip('PIL.Image')
        for name in ('a/ü.jpg', 'a/b.PNG'):
            writer.write(detection(name))
        writer.write(detection('c.jpg', error='torn', image=None))
        writer.close()
        with image_of.open(tmp_path / 'a/ü.jpg') as jpeg, image_of.open(tmp_path / 'a/b.PNG') as png:
            assert (jpeg.format, png.format, jpeg.size, png.size) == ('JPEG', 'PNG', (80, 60), (80, 60))
            assert max(jpeg.quantization[0]) < 15  # of quality 95
            expected = paint(detection(), CLASSES, PALETTE)
            np.testing.assert_array_equal(np.asarray(png)[..., ::-1], expected)
        assert sorted(path.name for path in tmp_path.rglob('*')) == ['a', 'b.PNG', 'ü.jpg']

    def test_a_jpeg_has_65500_columns_at_most(self, writer, tmp_path):
        image = np.zeros((2, 65501, 3), np.uint8)
        none = dict(boxes=np.zeros((0, 4)), scores=np.zeros(0), labels=np.zeros(0, int), masks=None)
        with pytest.raises((ValueError, cv2.error), match=r'65501 x 2 pixels|65500'):
            writer.write(detection('a.jpg', size=image.shape[:2], image=image, **none))
        assert not list(tmp_path.rglob('*a.jpg*'))

    def test_videos(self, writer, tmp_path):
        """Odd sides, a rate that is no whole number, colours that decode as they were, playable from the beginning."""
        av = pytest.importorskip('av')
        target = tmp_path / 'in/clip.mp4'
        for prediction in self.frames(5):
            assert not target.exists()
            writer.write(prediction)
        assert target.is_file()
        with av.open(str(target)) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            assert (context.name, context.pix_fmt, context.width, context.height) == ('h264', 'yuv420p', 132, 98)
            assert float(stream.average_rate) == pytest.approx(29.97, abs=1e-3)
            frames = [frame.to_ndarray(format='bgr24') for frame in container.decode(stream)]
        assert len(frames) == 5
        for decoded, prediction in zip(frames, self.frames(5), strict=True):
            expected = paint(prediction, CLASSES, PALETTE)
            assert np.abs(decoded[:97, :131].astype(int) - expected).mean() < 6
            np.testing.assert_allclose(decoded[80:96, 100:130], expected[80:96, 100:130], atol=4)
            np.testing.assert_array_equal(decoded[:, 131].mean(), decoded[:, 130].mean())
        content = target.read_bytes()
        assert content.index(b'moov') < content.index(b'mdat')

    def test_videos_that_end_early(self, writer, tmp_path):
        """After an error the frames that there are stay; of a stopped run nothing does."""
        av = pytest.importorskip('av')
        for prediction in self.frames(3, size=(96, 130)):
            prediction.last = False
            prediction.fps = float('nan')
            writer.write(prediction)
        writer.write(detection('in/clip.mp4', frame=3, error='torn', image=None))
        with av.open(str(tmp_path / 'in/clip.mp4')) as container:
            assert container.streams.video[0].average_rate == 25
            assert len(list(container.decode(video=0))) == 3
        (tmp_path / 'in/clip.mp4').unlink()
        writer.write(next(self.frames(3)))
        writer.close()
        writer.close()
        writer.write(detection('none.mp4', frame=0, error='no frames', image=None))
        assert [path.name for path in tmp_path.rglob('*')] == ['in']

    def test_a_video_that_cannot_be_encoded_leaves_the_next_one_alone(self, writer, tmp_path, monkeypatch):
        first, *others = self.frames(3)
        writer.write(first)
        with monkeypatch.context() as patch:
            patch.setattr(writer, '_paint', lambda _: np.zeros((97, 131, 3), np.float64))
            for prediction in others:
                with pytest.raises(Exception):  # noqa: B017, PT011
                    writer.write(prediction)
        assert not [path for path in tmp_path.rglob('*') if path.is_file()]
        deque(map(writer.write, self.frames(2)))
        assert [path.name for path in tmp_path.rglob('*') if path.is_file()] == ['clip.mp4']

    def test_frames_of_other_sizes(self, tmp_path):
        av = pytest.importorskip('av')
        video = VideoWriter(tmp_path / 'a.mp4', 25)
        for size in ((40, 60), (80, 60)):
            video.write(np.zeros((*size, 3), np.uint8))
        video.close()
        with av.open(str(tmp_path / 'a.mp4')) as container:
            assert [(frame.height, frame.width) for frame in container.decode(video=0)] == [(40, 60)] * 2
        video = VideoWriter(tmp_path / 'b.mp4', 25)
        video.write(np.zeros((40, 60, 3), np.uint8))
        with pytest.raises(ValueError, match='dtype'):
            video.write(np.zeros((40, 60, 3), np.float64))
        assert [path.name for path in tmp_path.iterdir()] == ['a.mp4']

    def test_equal_frames_are_equal_bytes(self, tmp_path):
        """So a run that was stopped and taken up again leaves the files of a run in one go."""
        pytest.importorskip('av')
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        image = noise.repeat(4, axis=0).repeat(4, axis=1)
        for number in range(8):
            video = VideoWriter(tmp_path / f'{number}.mp4', 25)
            for shift in range(40):
                video.write(np.roll(image, 3 * shift, axis=1))
            video.close()
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1

    def test_full_disk(self, writer, tmp_path, monkeypatch):
        """The system says so when data are written to the disk, at the latest."""

        def fill_up(descriptor):
            raise OSError(errno.ENOSPC, 'No space left on device')

        monkeypatch.setattr(os, 'fsync', fill_up)
        for predictions in ([detection()], self.frames(2)):
            with pytest.raises(ToolError, match=r'cannot be written: no space left'):
                deque(map(writer.write, predictions))
        assert not [path for path in tmp_path.rglob('*') if path.is_file()]


class TestLabelMaps:
    @pytest.mark.parametrize(('kind', 'ids'), [(np.uint8, [0, 1, 149, 255]), (np.uint16, [0, 255, 256, 65535])])
    def test_pixels_are_ids(self, tmp_path, kind, ids):
        image_of = pytest.importorskip('PIL.Image')
        label_map = np.array(ids, kind).repeat(6).reshape(4, 6)
        writer = LabelMapWriter(tmp_path, lambda item: item.name + '.png' * (not item.is_video), PALETTE)
        for frame in (None, 12):
            item = Item('a', 'in/a', 0, 'a', is_video=frame is not None)
            writer.write(Prediction(item, frame, size=(4, 6), task='segmentation', label_map=label_map))
        writer.write(Prediction(item, error='torn'))
        writer.close()
        found = sorted(path for path in tmp_path.rglob('*') if path.is_file())
        assert found == [tmp_path / 'in/a/000012.png', tmp_path / 'in/a.png']
        for path in found:
            with image_of.open(path) as image:
                np.testing.assert_array_equal(np.asarray(image), label_map)
                if kind == np.uint8:
                    colours = np.asarray(image.convert('RGB'))
                    np.testing.assert_array_equal(colours[:2, 0], PALETTE)
                    assert (colours[3] == 255).all()

    def test_mmseg_reads_them(self, tmp_path):
        loading = pytest.importorskip('mmseg.datasets.transforms.loading')
        label_map = np.arange(256, dtype=np.uint8).reshape(16, 16)
        writer = LabelMapWriter(tmp_path, lambda item: 'a.png', PALETTE)
        writer.write(Prediction(Item('a', 'a', 0, 'a'), size=(16, 16), task='segmentation', label_map=label_map))
        loaded = loading.LoadAnnotations()(
            dict(seg_map_path=str(tmp_path / 'a.png'), seg_fields=[], reduce_zero_label=False)
        )
        np.testing.assert_array_equal(loaded['gt_seg_map'], label_map)
