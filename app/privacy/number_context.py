"""What the text before a number says of it: the words that announce a phone number, or the number of something else."""

from __future__ import annotations

from collections.abc import Callable

from app.privacy.shadow_text import FILLER, SPOKEN_AT, Shadow

_BETWEEN = " \t\r\n:.#()=>\"'-\u2022*,\u2116\u00b0\u00ba/"
_MOST_BETWEEN = 5
_SPOKEN = SPOKEN_AT.ljust(len(" at "), FILLER)

_PHONE_WORDS = """phone phones telephone mobile mobil mob cell call fax whatsapp sms text hotline dial contact
reach ring tel telefon telefonnummer rufnummer handy handynummer mobilnummer ruf rufen anruf telefono teléfono
móvil celular llama llame llamar llámame llámanos telefone telemóvel fone ligue contacto contato téléphone
portable appelez appelle chiama chiamami cellulare bel telefoonnummer mobiel mobilnr zadzwoń numer komórka
telefonu gsm ara ara telp hubungi тел телефон телефону телефона моб мобильный звони звоните позвони дзвони
дзвоніть"""
_PHONE_ENDINGS = """电话 電話 手机 手機 手机号 电话号码 携帯 携帯番号 電話番号 전화 전화번호 휴대폰 번호 هاتف
الهاتف جوال الجوال تليفون موبايل اتصل फोन फ़ोन मोबाइल नंबर טלפון נייד"""
_PHONE_FILLERS = """is are at on to me us no nr n num number nummer numero número numéro ist unter es al au a el
le la du il sotto pod na по на nomor é è est o os the my or under"""
_OTHER_WORDS = """order orders invoice receipt ticket sku ean upc isbn gtin asin ref reference serial part item
article product model id no nr batch lot version build tracking parcel issue bug pr commit rev revision po
bestellung auftrag bestellnummer rechnung rechnungsnummer artikel artikelnummer commande facture pedido factura
referencia ordine fattura zamówienie faktura sipariş заказ заказа артикул счет timestamp epoch unix seed port
pid total sum amount price barcode usd eur gbp chf inr cny rub brl"""
_OTHER_ENDINGS = "p/n s/n 订单 订单号 编号 条码 注文番号 주문번호 طلب"
_OTHER_FILLERS = "no nr n num number nummer id code numero número numéro is"


def _announces(words: str, endings: str, fillers: str, signs: str) -> Callable[[str], bool]:
    """Return a test whether a text ends with one of the words or signs, two fillers at most and some punctuation.

    Args: endings: words of scripts that are written without spaces, or with marks that are no letters.
    """

    def listed(names: str) -> list[str]:
        # As they look in a shadow, in which marks that combine with a letter are absent.
        return [Shadow.of(name).text for name in names.split()]

    known, between, unspaced = frozenset(listed(words)), frozenset(listed(fillers)), tuple(listed(endings))

    def ends(left: str) -> bool:
        # A word whatever the rest of the text makes of it.
        text = left.lower().replace(_SPOKEN, " at ")
        for _ in range(3):
            end = len(text.rstrip(_BETWEEN))
            if not end or len(text) - end > _MOST_BETWEEN or text[end - 1].isdigit():
                return False
            if any(sign in text[end:] for sign in signs):
                return True
            if text.endswith(unspaced, 0, end):
                return True
            start = end
            while start and text[start - 1].isalpha():
                start -= 1
            word = text[start:end]
            if word in known:
                return True
            if word not in between:
                return False
            text = text[:start]
        return False

    return ends


announces_phone = _announces(_PHONE_WORDS, _PHONE_ENDINGS, _PHONE_FILLERS, "")
"""Whether the text before a number announces a phone number."""
announces_other = _announces(_OTHER_WORDS, _OTHER_ENDINGS, _OTHER_FILLERS, "#\u2116")
"""Whether the text before a number announces the number of something else."""
