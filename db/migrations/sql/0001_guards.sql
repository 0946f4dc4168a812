-- What the database itself refuses or guarantees, whoever asks: tenancy, append-only, zero sums, one chain.
-- Guards only: no business rule lives here (docs/decisions/0003-database.md).

-- ---------------------------------------------------------------------------------------------------------------
-- The order in which events were accepted.
create sequence event_seq cache 1;

-- ---------------------------------------------------------------------------------------------------------------
-- Values that no code path may invent.
alter table program add constraint program_status_check check (status in ('ACTIVE', 'SUSPENDED', 'ARCHIVED'));
alter table asset add constraint asset_scale_check check (scale between 0 and 18);
alter table asset add constraint asset_status_check check (status in ('ACTIVE', 'ARCHIVED'));
alter table participant add constraint participant_status_check check (status in ('ACTIVE', 'SUSPENDED', 'CLOSED'));
alter table enrollment add constraint enrollment_status_check
    check (status in ('ACTIVE', 'FROZEN', 'LOCKED', 'CLOSED'));
alter table rule add constraint rule_status_check check (status in ('ACTIVE', 'SUSPENDED', 'ARCHIVED'));
alter table event add constraint event_status_check
    check (status in ('RECEIVED', 'PENDING', 'PROCESSING', 'COMPLETED', 'FAILED'));
alter table account add constraint account_bucket_check check (bucket in ('AVAILABLE', 'HELD', 'DEFERRED'));
alter table account add constraint account_entity_check check (
    entity_type in ('PARTICIPANT', 'GROUP', 'PROGRAM', 'SYSTEM_ISSUANCE', 'SYSTEM_BREAKAGE', 'SYSTEM_REDEMPTION')
    and (entity_id is null) = starts_with(entity_type, 'SYSTEM_'));
alter table posting add constraint posting_amount_check check (amount <> 0);
alter table posting add constraint posting_balance_check check ((version is null) = (balance is null));

-- ---------------------------------------------------------------------------------------------------------------
-- The queue is updated and scanned all the time: keep its dead rows few.
alter table event set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000);
alter table chain_head set (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
alter table lane set (fillfactor = 50);
alter table counter set (fillfactor = 80);

-- ---------------------------------------------------------------------------------------------------------------
-- Append-only: entries and postings are written once.
create function refuse_change() returns trigger language plpgsql as $$
begin
    raise exception '% is append-only: % refused', tg_table_name, tg_op using errcode = 'restrict_violation';
end $$;

create trigger journal_entry_append_only before update or delete or truncate on journal_entry
    for each statement execute function refuse_change();
create trigger posting_append_only before update or delete or truncate on posting
    for each statement execute function refuse_change();

-- Postings come first, all of an entry in one statement; then the entry seals them. So each statement of postings
-- must sum to zero per entry and asset, and none may join an entry that is sealed already. The look-ups go through the
-- primary keys whatever the statistics say: a young table's would suggest reading all of it, for every batch.
create function guard_postings() returns trigger language plpgsql set enable_seqscan = off as $$
declare
    offender uuid;
    entries record;
begin
    select p.entry_id into offender from inserted p
        group by p.organization_id, p.entry_id, p.asset_id having sum(p.amount) <> 0 limit 1;
    if found then
        raise exception 'postings of entry % do not sum to zero', offender using errcode = 'check_violation';
    end if;
    for entries in select organization_id, array_agg(distinct entry_id) as ids from inserted group by organization_id
    loop
        select e.id into offender from journal_entry e
            where e.organization_id = entries.organization_id and e.id = any(entries.ids) limit 1;
        if found then
            raise exception 'entry % is sealed already', offender using errcode = 'restrict_violation';
        end if;
    end loop;
    return null;
end $$;

create trigger posting_guard after insert on posting referencing new table as inserted
    for each statement execute function guard_postings();

create function guard_entries() returns trigger language plpgsql set enable_seqscan = off as $$
declare
    entries record;
    with_postings bigint;
begin
    for entries in select organization_id, array_agg(id) as ids, count(*) as n from inserted group by organization_id
    loop
        select count(*) into with_postings from posting p
            where p.organization_id = entries.organization_id and p.entry_id = any(entries.ids) and p.ordinal = 0;
        if with_postings <> entries.n then
            raise exception '% entries have no postings', entries.n - with_postings using errcode = 'check_violation';
        end if;
    end loop;
    return null;
end $$;

create trigger journal_entry_guard after insert on journal_entry referencing new table as inserted
    for each statement execute function guard_entries();

-- ---------------------------------------------------------------------------------------------------------------
-- The hash chain. Everything that does not depend on the sequence comes prepared: `p_entries` is an array of
-- {id, program_id, action_type, ..., body, tail}, and the canonical form of entry i (docs/ledger.md) is
--   {"action_type":"X","created_at":"T" || body || "prev_hash":"H" || tail || "sequence":N,"version":1}
-- The head's row lock is taken here and held until the commit, so the caller seals last and commits at once.
create function seal_entries(p_organization_id uuid, p_now timestamptz, p_entries json) returns timestamptz
language plpgsql as $$
declare
    head chain_head;
    sealed_at timestamptz;
    sealed_at_text text;
    pieces record;
    prev_hashes bytea[] := '{}';
    entry_hashes bytea[] := '{}';
    hash bytea;
    n bigint := 0;
begin
    select * into strict head from chain_head where organization_id = p_organization_id for no key update;
    sealed_at := greatest(p_now, head.created_at + interval '1 microsecond');
    sealed_at_text := to_char(sealed_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS')
        || case when extract(microseconds from sealed_at)::bigint % 1000000 = 0 then ''
           else to_char(sealed_at at time zone 'UTC', '.US') end || 'Z';
    hash := head.hash;
    for pieces in select action_type, body, tail from json_to_recordset(p_entries)
        as e (action_type text, body text, tail text)
    loop
        n := n + 1;
        prev_hashes := prev_hashes || hash;
        hash := sha256(convert_to(
            '{"action_type":"' || pieces.action_type || '","created_at":"' || sealed_at_text || '",' || pieces.body
            || ',"prev_hash":"' || encode(hash, 'hex') || '",' || pieces.tail
            || ',"sequence":' || (head.sequence + n)::text || ',"version":1}', 'UTF8'));
        entry_hashes := entry_hashes || hash;
    end loop;
    if n = 0 then
        raise exception 'nothing to seal' using errcode = 'check_violation';
    end if;
    insert into journal_entry (organization_id, id, sequence, program_id, action_type, description, event_id, rule_id,
                               reference_id, api_key_id, request_id, created_at, prev_hash, entry_hash, hash_version)
    select p_organization_id, e.id, head.sequence + e.ordinal, e.program_id, e.action_type, e.description, e.event_id,
           e.rule_id, e.reference_id, e.api_key_id, e.request_id, sealed_at, prev_hashes[e.ordinal],
           entry_hashes[e.ordinal], 1
    from rows from (json_to_recordset(p_entries) as (
        id uuid, program_id uuid, action_type text, description text, event_id uuid, rule_id uuid, reference_id text,
        api_key_id uuid, request_id text)) with ordinality as e (
        id, program_id, action_type, description, event_id, rule_id, reference_id, api_key_id, request_id, ordinal);
    update chain_head c set sequence = head.sequence + n, hash = entry_hashes[n], created_at = sealed_at
        where c.organization_id = p_organization_id;
    return sealed_at;
end $$;

-- ---------------------------------------------------------------------------------------------------------------
-- Tenancy. A transaction names its organization in `app.org`; without one it sees nothing.
create function current_org() returns uuid language sql stable parallel safe as
    $$ select nullif(current_setting('app.org', true), '')::uuid $$;

-- Queries name their organization themselves; the policy is the second fence. It is a CASE, so that the planner doesn't
-- take it for a second equality: it would multiply both selectivities, believe that a tenant has one row, and then find
-- any index as good as the right one. For the same reason the column has no statistics: a tenant that they don't know yet
-- would count as one row, while without them every tenant counts as a two-hundredth of the table.
create function fence(p_table text, p_column text) returns void language plpgsql as $$
begin
    execute format('alter table %I enable row level security', p_table);
    execute format('create policy tenant on %I using (case when %I = (select current_org()) then true else false end)',
                   p_table, p_column);
    execute format('alter table %I alter column %I set statistics 0', p_table, p_column);
end $$;

do $$
declare
    tenant_table text;
begin
    for tenant_table in
        select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid
        where c.relkind = 'r' and c.relnamespace = 'public'::regnamespace and a.attname = 'organization_id'
    loop
        perform fence(tenant_table, 'organization_id');
    end loop;
end $$;
select fence('organization', 'id');

-- The one way in: a key's hash names the organization of this transaction. Contract: basics.md 3.
create function login(p_key_hash bytea)
returns table (api_key_id uuid, organization_id uuid, rate_per_second int, rate_burst int)
language plpgsql security definer set search_path = pg_catalog, public as $$
begin
    select k.id, o.id, o.rate_per_second, o.rate_burst
        into api_key_id, organization_id, rate_per_second, rate_burst
        from api_key k join organization o on o.id = k.organization_id
        where k.key_hash = p_key_hash and k.revoked_at is null;
    -- A step of its own: inside the query it would run for every row that the plan looks at, not only the one found.
    if found then
        perform set_config('app.org', organization_id::text, true);
        return next;
    end if;
end $$;

-- Programs of any organization whose events wait longer than they should: lost wakes.
create function programs_with_due_events(p_older_than timestamptz, p_limit int)
returns table (organization_id uuid, program_id uuid)
language sql stable security definer set search_path = pg_catalog, public as $$
    select l.organization_id, l.program_id from lane l join program p using (organization_id)
    where p.id = l.program_id and not p.processing_paused and (
        exists (select from event e where e.organization_id = l.organization_id and e.program_id = l.program_id
                and e.status in ('RECEIVED', 'PENDING') and e.due_at is null and e.created_at <= p_older_than)
        or exists (select from event e where e.organization_id = l.organization_id and e.program_id = l.program_id
                and e.status in ('RECEIVED', 'PENDING') and e.due_at is not null and e.due_at <= p_older_than))
    limit p_limit
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- What the application may do: exactly what it needs. It owns nothing and deletes only where the contract deletes.
revoke all on function login(bytea), programs_with_due_events(timestamptz, int) from public;
grant usage on schema public to scrip_app;
grant usage on sequence event_seq to scrip_app;
grant execute on function login(bytea), programs_with_due_events(timestamptz, int) to scrip_app;
grant select on organization, api_key to scrip_app;
grant select, insert, update on program, lane, asset, participant, enrollment, rule, event, chain_head to scrip_app;
grant select, insert, update, delete on program_asset, tag, attribute, counter to scrip_app;
grant select, insert on account, journal_entry, posting, rule_history, state_history, idempotency_key to scrip_app;
