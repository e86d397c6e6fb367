"""How "answer" is written in the languages of MMMLU, and letters of other scripts that stand for A to D."""

from __future__ import annotations

from string import ascii_uppercase

WORDS = {
    "en": ("Answer",),
    "bn": ("উত্তর",),
    "hi": ("उत्तर",),
    "de": ("Antwort",),
    "ko": ("답변", "정답", "답"),
    "zh": ("答案", "答复", "答曰", "答"),
    "ar": (
        "الإجابة النهائية", "الإجابة الصحيحة هي", "الإجابة الصحيحة", "الإجابة هي", "الإجابة", "الجواب النهائي", "الجواب",
        "إجابة",
    ),
    "es": ("Respuesta",),
    "it": ("Risposta",),
    "ja": ("答え", "回答", "解答"),
    "id": ("Jawaban",),
    "fr": ("Réponse",),
    "pt": ("Resposta",),
    "sw": ("Jibu",),
    "yo": ("Ìdáhùn", "Idáhùn", "Idahun", "Àmọ̀nà", "Àdáhùn", "Ànúgọ", "Àṣàyàn"),
}  # fmt: skip
"""By language. Of words that begin alike the longer one stands first."""

OTHER_LETTERS = {"أ": "A", "ب": "B", "ج": "C", "د": "D", "অ": "A", "ব": "B", "ড": "C", "ঢ": "D"}
OTHER_LETTERS |= {chr(ord("Ａ") + k): letter for k, letter in enumerate(ascii_uppercase)}
"""Arabic, Bengali and full-width letters."""
