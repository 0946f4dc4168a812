"""Makes purchases.csv: what 200 cardholders bought from July to September 2026, the same bytes every time.

Run it as `python -m demo.make_purchases`. Amounts are drawn as whole cents, so no float ever touches one.
"""

import csv
import random
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

SEED = 2026
CARDHOLDERS = 200
PURCHASES = 5_000
FIRST_INSTANT = datetime(2026, 7, 1, tzinfo=UTC)
END = datetime(2026, 10, 1, tzinfo=UTC)
PURCHASES_CSV = Path(__file__).parent / "purchases.csv"

# Every eighth cardholder travels for work: more purchases, and larger ones.
TRAVELLER_EVERY = 8
TRAVELLER_SHARE = 12
TRAVELLER_FACTOR = 3
SHARES = (3, 9)


@dataclass(frozen=True, slots=True)
class Merchant:
    """Where people buy: `share` of all purchases, each from `low_cents` to `high_cents`."""

    name: str
    mcc: str
    share: int
    low_cents: int
    high_cents: int


@dataclass(frozen=True, slots=True)
class Purchase:
    """One line of the file; `amount` is dollars with two decimals, `mcc` the merchant category code."""

    transaction_id: str
    cardholder: str
    occurred_at: str
    mcc: str
    merchant: str
    amount: str


MERCHANTS = (
    Merchant("Corner Bistro", "5812", 12, 1_400, 9_800),
    Merchant("Harbor Taproom", "5813", 4, 900, 6_400),
    Merchant("Noodle Counter", "5814", 12, 650, 2_900),
    Merchant("Fresh Field Market", "5411", 22, 1_200, 16_500),
    Merchant("Old Town Butcher", "5422", 4, 1_100, 7_200),
    Merchant("Ridge Road Fuel", "5541", 10, 2_200, 8_400),
    Merchant("Metro Transit", "4111", 9, 275, 3_300),
    Merchant("Elm Street Pharmacy", "5912", 7, 480, 5_600),
    Merchant("Northside Outfitters", "5651", 6, 1_900, 21_000),
    Merchant("Signal Mobile", "4814", 4, 2_500, 9_500),
    Merchant("Bright Electronics", "5732", 3, 3_900, 89_900),
    Merchant("Blue Sky Airlines", "4511", 3, 8_900, 74_000),
    Merchant("Lakeview Hotel", "7011", 4, 9_800, 61_000),
)


def make_purchases(seed: int = SEED) -> list[Purchase]:
    """The purchases in the order in which they happened."""
    # Only randrange and choice are used: their sequences have been the same in every Python since 3.2.
    rng = random.Random(seed)  # noqa: S311
    buyers = [number for number in range(1, CARDHOLDERS + 1) for _ in range(_share(rng, number))]
    merchants = [merchant for merchant in MERCHANTS for _ in range(merchant.share)]
    seconds = int((END - FIRST_INSTANT).total_seconds())
    drawn = sorted((rng.randrange(seconds), rng.choice(buyers)) for _ in range(PURCHASES))
    return [
        _purchase(index, FIRST_INSTANT + timedelta(seconds=second), buyer, rng.choice(merchants), rng)
        for index, (second, buyer) in enumerate(drawn, start=1)
    ]


def as_csv(purchases: list[Purchase]) -> str:
    """The file's text: a header, then one line per purchase."""
    text = StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Purchase)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(purchase) for purchase in purchases)
    return text.getvalue()


def read_purchases(path: Path = PURCHASES_CSV) -> list[Purchase]:
    """The purchases in a file that `as_csv` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Purchase(**row) for row in csv.DictReader(file)]


def _share(rng: random.Random, cardholder: int) -> int:
    return TRAVELLER_SHARE if _travels(cardholder) else rng.randrange(*SHARES)


def _travels(cardholder: int) -> bool:
    return cardholder % TRAVELLER_EVERY == 0


def _purchase(index: int, instant: datetime, buyer: int, merchant: Merchant, rng: random.Random) -> Purchase:
    cents = rng.randrange(merchant.low_cents, merchant.high_cents + 1) * (TRAVELLER_FACTOR if _travels(buyer) else 1)
    return Purchase(
        transaction_id=f"txn-{index:06d}",
        cardholder=f"card-{buyer:04d}",
        occurred_at=instant.strftime("%Y-%m-%dT%H:%M:%SZ"),
        mcc=merchant.mcc,
        merchant=merchant.name,
        amount=f"{cents // 100}.{cents % 100:02d}",
    )


if __name__ == "__main__":
    PURCHASES_CSV.write_text(as_csv(make_purchases()), encoding="utf-8", newline="")
