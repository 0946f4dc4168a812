-- The fences of the second set of tables, as 0001_guards.sql drew them for the first.

alter table holder_group add constraint holder_group_status_check check (status in ('ACTIVE', 'ARCHIVED'));
alter table group_member add constraint group_member_role_check check (role in ('ADMIN', 'MEMBER'));
alter table group_member add constraint group_member_status_check check (status in ('ACTIVE', 'LEFT'));
alter table lot add constraint lot_status_check
    check (status in ('DEFERRED', 'AVAILABLE', 'HELD', 'CONSUMED', 'EXPIRED'));
alter table lot add constraint lot_remaining_check check (remaining >= 0 and remaining <= amount and amount > 0);
alter table lot add constraint lot_hold_check check ((status = 'HELD') <= (hold_id is not null));
alter table hold add constraint hold_status_check
    check (status in ('ACTIVE', 'RELEASED', 'FORFEITED', 'SETTLED', 'VOIDED', 'EXPIRED'));
alter table hold add constraint hold_kind_check check (kind in ('OWN', 'PROVISIONAL', 'REDEMPTION'));
alter table hold add constraint hold_remaining_check check (remaining >= 0 and remaining <= amount and amount > 0);
alter table hold add constraint hold_active_check check ((status = 'ACTIVE') = (remaining > 0));
alter table hold add constraint hold_end_check check ((expires_at is null) = (carrier is null));

alter table lot set (fillfactor = 80);
alter table hold set (fillfactor = 80);

create trigger lot_change_append_only before update or delete or truncate on lot_change
    for each statement execute function refuse_change();
create trigger hold_change_append_only before update or delete or truncate on hold_change
    for each statement execute function refuse_change();
create trigger system_checkpoint_append_only before update or delete or truncate on system_checkpoint
    for each statement execute function refuse_change();

do $$
declare
    tenant_table text;
begin
    foreach tenant_table in array array['holder_group', 'group_member', 'lot', 'lot_change', 'hold', 'hold_change',
                                        'system_checkpoint', 'ledger_verification']
    loop
        perform fence(tenant_table, 'organization_id');
    end loop;
end $$;

-- Organizations whose background work a worker looks after: upkeep and nightly verification go through them all.
create function organization_ids(p_after uuid, p_limit int) returns setof uuid
language sql stable security definer set search_path = pg_catalog, public as $$
    select id from organization where p_after is null or id > p_after order by id limit p_limit
$$;

revoke all on function organization_ids(uuid, int) from public;
grant execute on function organization_ids(uuid, int) to scrip_app;
grant select, insert, update on holder_group, group_member, lot, hold, ledger_verification to scrip_app;
grant update (result) on idempotency_key to scrip_app;
grant select, insert on lot_change, hold_change, system_checkpoint to scrip_app;
