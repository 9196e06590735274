"""What the text before a number says of it: the words that announce a phone number, or the number of something else."""

from __future__ import annotations

import re
from collections.abc import Callable

from app.privacy.shadow_text import Shadow

_BETWEEN = r"[\s:.#()=>\"'\-\u2022*,]{0,4}"

# Words for phones and calls in the languages of the default regions; those that inflect are cut to their stem.
_PHONE_WORDS = """phone mobile mobil mob cell call fax whatsapp sms text hotline dial contact reach ring
tel telefon telefono teléfono telefone téléphone telephone telefonnummer handy handynummer ruf anruf rufnummer mobilnummer
llama llame llamar llámame llámanos móvil celular fone ligue liga contacto contato telemóvel appelez appelle portable
chiama chiamare chiamami cellulare bel mobiel telefoonnummer ring mobilnr zadzwoń komórka numer ara arayın cep gsm
тел телефон моб мобильный звони звоните позвони номер телефона дзвони дзвоніть телефону
电话 電話 手机 手機 联系电话 携帯 전화 전화번호 휴대폰 번호 هاتف جوال تليفون موبايل اتصل फोन मोबाइल नंबर טלפון נייד telp hubungi"""
_FILLERS = """is are at on to me us no nr num number nummer ist unter es al au a el le la du il sotto pod na nº
n° numero número numéro по на nomor é è est o os the my or under numaram numarası"""
_OTHER_WORDS = r"""order invoice receipt ticket sku ean upc isbn gtin asin ref reference serial part item article
product model id no nr batch lot version build tracking parcel issue bug pr commit build version rev revision po
bestellung bestellnummer auftrag rechnung rechnungsnummer artikel artikelnummer kundennummer commande facture pedido
factura referencia ordine fattura zamówienie faktura sipariş заказ заказа артикул счет 订单 订单号 编号 注文番号 주문번호 طلب
timestamp epoch unix seed port pid total sum amount price barcode"""


def _ends_with(words: str, fillers: str, signs: str) -> Callable[[str], bool]:
    """Return a test whether a text ends with one of the words or signs, fillers and punctuation after it."""

    def alternatives(listed: str) -> str:
        # As they look in a shadow, in which marks that combine with a letter are absent.
        return "|".join(sorted({re.escape(Shadow.of(word).text) for word in listed.split()}, key=len, reverse=True))

    # No letter may stand before a word of an alphabet; scripts without spaces have none there.
    pattern = re.compile(
        rf"(?:(?<![A-Za-z\u00c0-\u04ff])(?:{alternatives(words)}){signs}){_BETWEEN}"
        rf"(?:(?:{alternatives(fillers)}){_BETWEEN}){{0,2}}\Z",
        re.IGNORECASE,
    )

    def ends(left: str) -> bool:
        # Cheap, and true of every number but the first of a table.
        before = left.rstrip(" \t,.-/()")
        return bool(before) and not before[-1].isdigit() and pattern.search(left) is not None

    return ends


PHONE_WORD = _ends_with(_PHONE_WORDS, _FILLERS, "")
"""Whether the text before a number announces a phone number."""
NOT_A_PHONE = _ends_with(_OTHER_WORDS, "no nr num number nummer id code numero número is", "|[#\u2116]")
"""Whether the text before a number announces the number of something else."""
