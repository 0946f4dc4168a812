-- The fences of the tables behind rules and spending, as 0001_guards.sql drew them for the first.

-- Consumed may lie above the maximum: after the limit was lowered (domain/rules/budgets.py).
alter table rule_budget add constraint rule_budget_amounts_check check (consumed >= 0 and maximum > 0);
alter table rule_budget add constraint rule_budget_schedule_check check (
    case schedule_type
        when 'CRON' then cron_expression is not null and interval is null and next_reset_at is not null
        when 'INTERVAL' then cron_expression is null and interval is not null and next_reset_at is not null
        else schedule_type is null and cron_expression is null and interval is null and next_reset_at is null
    end);
alter table rule_budget set (fillfactor = 50);
alter table automation add constraint automation_status_check
    check (status in ('active', 'paused', 'archived', 'completed', 'failed'));
alter table automation add constraint automation_execution_check
    check (execution_status in ('idle', 'pending', 'executing', 'completed', 'failed'));
alter table simulation add constraint simulation_status_check
    check (status in ('PENDING', 'RUNNING', 'COMPLETED', 'FAILED', 'CANCELED'));
alter table reward add constraint reward_status_check
    check (status in ('DRAFT', 'ACTIVE', 'OUT_OF_STOCK', 'ARCHIVED'));
alter table reward add constraint reward_type_check check (redemption_type in ('UNIT_BASED', 'AMOUNT_BASED'));
alter table reward add constraint reward_stock_check
    check (redeemed_count >= 0 and (max_total is null or redeemed_count <= max_total) and unit_cost > 0);
alter table reward set (fillfactor = 50);
alter table reward_usage add constraint reward_usage_quantity_check check (quantity >= 0);
alter table redemption add constraint redemption_status_check check (
    status in ('PENDING', 'COMPLETED', 'PARTIALLY_REVERSED', 'FULLY_REVERSED', 'CANCELED', 'EXPIRED'));
alter table redemption add constraint redemption_amounts_check check (
    amount > 0 and reversed_amount between 0 and amount
    and (quantity is null or (quantity > 0 and reversed_quantity between 0 and quantity)));
alter table redemption add constraint redemption_reversed_check check (
    (status = 'FULLY_REVERSED') = (reversed_amount = amount)
    and (status = 'PARTIALLY_REVERSED') = (reversed_amount > 0 and reversed_amount < amount));
alter table redemption_lot add constraint redemption_lot_amounts_check
    check (amount > 0 and refilled between 0 and amount);
alter table redemption set (fillfactor = 80);

create trigger redemption_reversal_append_only before update or delete or truncate on redemption_reversal
    for each statement execute function refuse_change();
create trigger participant_status_change_append_only before update or delete or truncate on participant_status_change
    for each statement execute function refuse_change();
create trigger transfer_append_only before update or delete or truncate on transfer
    for each statement execute function refuse_change();
create trigger transfer_recipient_append_only before update or delete or truncate on transfer_recipient
    for each statement execute function refuse_change();

do $$
declare
    tenant_table text;
begin
    foreach tenant_table in array array['rule_budget', 'automation', 'simulation', 'simulation_holder', 'reward',
                                        'participant_status_change',
                                        'reward_usage', 'redemption', 'redemption_lot', 'redemption_reversal',
                                        'transfer', 'transfer_recipient']
    loop
        perform fence(tenant_table, 'organization_id');
    end loop;
end $$;

-- Sent with the commit of what is to be done until an instant or never (Transaction.commit_by): by the clock that all
-- processes share, whatever the transaction began with and however long its client stood still.
create function refuse_late(p_not_after timestamptz) returns void language plpgsql volatile as $$
begin
    if clock_timestamp() > p_not_after then
        raise exception 'it is too late to commit' using errcode = 'SC001';
    end if;
end $$;

-- Programs whose events, or whose automations that make one, wait longer than they should.
create or replace function programs_with_due_events(p_older_than timestamptz, p_limit int)
returns table (organization_id uuid, program_id uuid)
language sql stable security definer set search_path = pg_catalog, public as $$
    select l.organization_id, l.program_id from lane l join program p using (organization_id)
    where p.id = l.program_id and not p.processing_paused and (
        exists (select from event e where e.organization_id = l.organization_id and e.program_id = l.program_id
                and e.status in ('RECEIVED', 'PENDING') and e.due_at is null and e.created_at <= p_older_than)
        or exists (select from event e where e.organization_id = l.organization_id and e.program_id = l.program_id
                and e.status in ('RECEIVED', 'PENDING') and e.due_at is not null and e.due_at <= p_older_than)
        or p.status = 'ACTIVE' and exists (
                select from automation a where a.organization_id = l.organization_id
                and a.program_id = l.program_id and a.status = 'active' and a.trigger_type = 'one_time'
                and a.trigger_at <= p_older_than))
    limit p_limit
$$;

-- Programs that have a fan-out to work on, none of whose fan-outs has moved since an instant. As domain/fan_outs.py says,
-- one that has begun goes on whatever becomes of its automation or program, unless processing is paused.
create function programs_with_fan_outs(p_idle_since timestamptz, p_limit int)
returns table (organization_id uuid, program_id uuid, program_name text)
language sql stable security definer set search_path = pg_catalog, public as $$
    select a.organization_id, a.program_id, p.name
    from automation a join program p on p.organization_id = a.organization_id and p.id = a.program_id
    where a.execution_status in ('pending', 'executing') and not p.processing_paused
      and (a.execution_status = 'executing' or (a.status = 'active' and p.status = 'ACTIVE'))
    group by a.organization_id, a.program_id, p.name
    having max(a.updated_at) <= p_idle_since
    limit p_limit
$$;

-- Pending redemptions of any organization, the next to expire first: each has a workflow that carries it.
create function pending_redemptions(
    p_after_organization uuid, p_after_expires_at timestamptz, p_after_id uuid, p_limit int)
returns table (organization_id uuid, id uuid, program_id uuid, participant_id uuid, expires_at timestamptz)
language sql stable security definer set search_path = pg_catalog, public as $$
    select r.organization_id, r.id, r.program_id, r.participant_id, r.expires_at from redemption r
    where r.status = 'PENDING' and (r.organization_id, r.expires_at, r.id) > (p_after_organization, p_after_expires_at, p_after_id)
    order by r.organization_id, r.expires_at, r.id limit p_limit
$$;

-- Simulations that a workflow has to carry: those that have not ended, and those that have left something behind.
create function open_simulations(p_limit int)
returns table (organization_id uuid, id uuid, program_id uuid)
language sql stable security definer set search_path = pg_catalog, public as $$
    select s.organization_id, s.id, s.program_id from simulation s
    where s.status in ('PENDING', 'RUNNING') or exists (
        select from simulation_holder h where h.organization_id = s.organization_id and h.simulation_id = s.id)
    order by s.created_at limit p_limit
$$;

revoke all on function programs_with_fan_outs(timestamptz, int), pending_redemptions(uuid, timestamptz, uuid, int), open_simulations(int),
    refuse_late(timestamptz)
    from public;
grant execute on function programs_with_fan_outs(timestamptz, int), pending_redemptions(uuid, timestamptz, uuid, int), open_simulations(int),
    refuse_late(timestamptz)
    to scrip_app;
grant select, insert, update, delete on rule_budget, simulation_holder to scrip_app;
grant select, insert, update on automation, simulation, reward, reward_usage, redemption, redemption_lot to scrip_app;
grant select, insert on participant_status_change, redemption_reversal, transfer, transfer_recipient to scrip_app;
