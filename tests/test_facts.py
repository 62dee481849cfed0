"""What the metadata says of the database beside its tables: whose roles a restore will name."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cluster import Cluster
from conftest import MakeProject
from support import Database, new_database, read_metadata

# Each role is named in one place alone, and the last ones only in another database.
ROLES = """
CREATE ROLE facts_owner;
CREATE ROLE facts_guest CONNECTION LIMIT 0;
CREATE ROLE facts_heir NOINHERIT;
CREATE ROLE facts_group;
CREATE ROLE facts_granting CREATEROLE;
CREATE ROLE facts_reader LOGIN PASSWORD 'secret' IN ROLE pg_read_all_data;
CREATE ROLE facts_elsewhere;
GRANT facts_group TO facts_granting WITH ADMIN OPTION;
"""
# Of one membership the first grantor withholds what the second gives (16 and later), and of another
# nobody gives it.
MEMBERSHIPS = """
GRANT facts_group TO facts_heir WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
GRANT facts_group TO facts_guest WITH INHERIT FALSE, SET FALSE;
SET ROLE facts_granting;
GRANT facts_group TO facts_heir WITH ADMIN FALSE, INHERIT TRUE, SET TRUE;
"""
# To nobody, who is not asked.
SUBSCRIBE = """
CREATE SUBSCRIPTION "{}" CONNECTION 'host=nowhere' PUBLICATION p
    WITH (connect = false, slot_name = NONE)
"""
NAMES = "facts_owner, facts_guest, facts_heir, facts_granting, facts_group, facts_reader"


@pytest.fixture
def databases(each_cluster: Cluster) -> Iterator[tuple[Database, Database]]:
    """One with these roles, and another whose roles and subscription are none of its business."""
    each_cluster.psql(ROLES)
    if each_cluster.psql("SHOW server_version_num") >= "160000":
        each_cluster.psql(MEMBERSHIPS)
    with new_database(each_cluster, "--owner=facts_owner") as one:
        one.psql(
            f"GRANT CONNECT ON DATABASE {one.name} TO facts_guest;"
            "CREATE TABLE t (); GRANT SELECT ON t TO facts_heir"
        )
        with new_database(each_cluster, "--owner=facts_elsewhere") as other:
            for database, subscription in ((one, "mine"), (other, "another's")):
                database.psql(SUBSCRIBE.format(subscription))
            yield one, other
            other.psql("""DROP SUBSCRIPTION "another's" """)
        one.psql("DROP SUBSCRIPTION mine")
    each_cluster.psql(f"DROP ROLE facts_elsewhere, {NAMES}")


def test_roles_are_those_of_this_database(
    databases: tuple[Database, Database], make_project: MakeProject
) -> None:
    database, _ = databases
    facts = read_metadata(make_project(database).back_up())
    named = {"postgres", "facts_owner", "facts_guest", "facts_heir"}
    assert set(facts["roles"]) == set(facts["role_attributes"]) == named
    limits = {role: about["connection_limit"] for role, about in facts["role_attributes"].items()}
    assert limits == {**dict.fromkeys(named, -1), "facts_guest": 0}
    if "set" in json.dumps(facts["role_attributes"]["facts_heir"]["member_of"]):
        heir, guest = (
            facts["role_attributes"][role]["member_of"]["facts_group"]
            for role in ("facts_heir", "facts_guest")
        )
        assert heir == {"admin": True, "inherit": True, "set": True}
        assert guest == {"admin": False, "inherit": False, "set": False}
    else:
        assert database.cluster.psql("SHOW server_version_num") < "160000"


def test_what_is_left_out_is_of_this_database(
    databases: tuple[Database, Database], make_project: MakeProject
) -> None:
    """A subscription is the whole server's, and all may see whose it is."""
    database, _ = databases
    project = make_project(database, settings=database.settings("facts_reader", "secret"))
    facts = read_metadata(project.back_up())
    assert facts["not_included"] == ["subscriptions, which only a superuser can back up (mine)"]
