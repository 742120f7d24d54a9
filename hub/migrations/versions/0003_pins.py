"""Which adapters a router pins: they are kept as long as it is."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ROUTER = "lora-moe"  # the only kind of before that pins others


def upgrade() -> None:
    pins = op.create_table(
        "pins",
        sa.Column("digest", sa.String(71), sa.ForeignKey("manifests.digest"), primary_key=True),
        sa.Column("name", sa.String(193), primary_key=True),
        sa.Column("pinned", sa.String(71), primary_key=True, index=True),
    )
    connection = op.get_bind()
    manifests = sa.table("manifests", sa.column("digest"), sa.column("kind"), sa.column("body"))
    routers = sa.select(manifests.c.digest, manifests.c.body).where(manifests.c.kind == ROUTER)
    for digest, body in connection.execute(routers).all():
        for expert in json.loads(body)["config"]["experts"]:
            name, _, pinned = expert.partition("@")
            connection.execute(pins.insert().values(digest=digest, name=name, pinned=pinned))


def downgrade() -> None:
    op.drop_table("pins")
