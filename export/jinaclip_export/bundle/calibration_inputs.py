"""Calibration inputs for an fp32 graph: texts in many scripts, photos and synthetic images.

The inputs are fixed, so the same checkpoint gives the same bundle everywhere. `jinaclip certify` measures the result on
other sentences, and on crops that are not among these inputs. probe-photos/ has six photos, scaled down to at most
512 px; NOTICE names their authors.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

import numpy as np
from PIL import Image

PROBE_TEXTS = (
    "cat",
    "A beautiful sunset over the beach, seen from a wooden pier while children play in the shallow water.",
    "海滩上美丽的日落，渔船正在慢慢驶回港口。",
    "浜辺に沈む美しい夕日を、二人で静かに眺めていた。",
    "해변 위로 아름다운 일몰이 펼쳐진다.",
    "غروب جميل على الشاطئ بعد يوم طويل وحار.",
    "समुद्र तट पर एक खूबसूरत सूर्यास्त",
    "Закат над морем, вид с балкона старой гостиницы.",
    "Ένα ηλιοβασίλεμα πάνω από την παραλία",
    "Ein Fahrrad lehnt an einer roten Ziegelwand; daneben steht ein Korb voller Äpfel.",
    "Tổng cộng 12 chiếc thuyền, giá 3.450.000 đồng mỗi chiếc (chưa gồm thuế).",
    "def area(r): return 3.14159 * r ** 2  # https://example.org/?q=a&b=%20",
    "!!! ??? ... --- +++ *** ### 0000 1234567890 \U0001f600\U0001f680\U0001f9ff",
    "the the the the the the the the the the the the the the the the the the the the the the the the",
    "two dogs",
    "Wie wird das Wetter morgen in Hamburg?",
    "¿Dónde puedo comprar entradas para el concierto del sábado por la noche?",
    "La receta lleva tres huevos, doscientos gramos de harina y una pizca de sal.",
    "Une vieille femme vend des fleurs au marché, sous un parapluie jaune.",
    "Um gato preto dorme em cima do teclado de um computador.",
    "Il treno per Milano parte dal binario sette con venti minuti di ritardo.",
    "Kırmızı bir bisiklet, eski bir kapının önünde duruyor.",
    "Un zbor direct de la București la Madrid durează aproape patru ore.",
    "ผู้หญิงถือร่มเดินข้ามถนนในวันที่ฝนตก",
    "একটি ছোট নৌকা নদীর ধারে বাঁধা আছে।",
    "ספר ישן מונח על שולחן עץ ליד החלון",
    "چند کودک در پارک با توپ بازی می‌کنند",
    "Pies biegnie po śniegu za czerwoną piłką.",
    "Seekor burung kecil hinggap di dahan pohon mangga.",
    "Hình ảnh một tách cà phê nóng trên bàn làm việc.",
    "机器学习模型把图片和文字放进同一个向量空间。",
    "How do I reset the password of an account whose e-mail address no longer exists, and whom should I write to if "
    "the form on the help page keeps returning an error after the second step?",
)

CROPS = 3  # number of crops of each photo


def probe_pictures(size: int) -> Iterator[Image.Image]:
    """RGB images: six photos, each followed by CROPS random crops of it; then [size, size] black, white, noise, and
    smooth random shapes at several scales.
    """
    rng = np.random.default_rng(7)
    photos = files("jinaclip_export").joinpath("probe-photos")
    for entry in sorted(photos.iterdir(), key=lambda entry: entry.name):
        with entry.open("rb") as file:
            photo = Image.open(file).convert("RGB")
        yield photo
        for _ in range(CROPS):
            width, height = np.round(np.array(photo.size) * rng.uniform(0.3, 0.8, 2)).astype(int).tolist()
            left, top = rng.integers(0, [photo.width - width + 1, photo.height - height + 1]).tolist()
            yield photo.crop((left, top, left + width, top + height))
    rng = np.random.default_rng(3)
    yield Image.new("RGB", (size, size), (0, 0, 0))
    yield Image.new("RGB", (size, size), (255, 255, 255))
    yield Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    for _ in range(3):
        picture = np.full((size, size, 3), rng.uniform(60, 190, 3), np.float32)
        for cells in (3, 6, 12, 25, 50, 100):
            for channel in range(3):
                noise = rng.normal(0, 70 * cells**-0.4, (cells, cells)).astype(np.float32)
                fine = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
                picture[..., channel] += np.asarray(fine)
        yield Image.fromarray(picture.clip(0, 255).astype(np.uint8))
