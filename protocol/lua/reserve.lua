-- Reserve a request in the home slot against its tenant's limits, before it is accepted in its own slot.
-- Begins with a write that is refused when the server is out of memory.
-- KEYS: the limits. ARGV: P, tenant, rid, slot, prompt tokens, the limits: requests at once, requests and tokens per minute
--       ('' = none), or '-' for all three: as they were told last; milliseconds until the first look of the sweep
-- -> {'free'}: there are no limits and no budget | {'held', requests left, tokens left} ('' where there is no such limit), also if the
--    rid has a reservation already | {'limit', which, milliseconds to wait, requests left, tokens left}; 'budget': the money
--    of the day
local tenant, rid, slot, prompt = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local limits, run, now = P .. 't:' .. tenant, P .. 'run:' .. tenant, tonumber(milliseconds())
if redis.call('HEXISTS', run, rid) == 1 then return {'held', rate_left(tenant, now)} end
local budget = redis.call('HGET', P .. 'terms', 'b:' .. tenant)
if ARGV[6] ~= '-' then
  local any = ARGV[6] ~= '' or ARGV[7] ~= '' or ARGV[8] ~= ''
  if any or redis.call('EXISTS', limits) == 1 then
    redis.call('HSET', limits, 'concurrent', ARGV[6], 'rpm', ARGV[7], 'tpm', ARGV[8])
    redis.call('PEXPIRE', limits, any and LIMITS_STAY or 1)
  end
  if not any and not budget then return {'free'} end
elseif redis.call('EXISTS', limits) == 0 and not budget then
  return {'free'}
end
if tonumber(budget or '') and over_budget(tenant, tonumber(budget), now) then
  return {'limit', 'budget', (day_of(now) + 1) * 86400000 - now, '', ''}
end
local which, wait = met_limit(tenant, prompt, now)
if which then return {'limit', which, wait, rate_left(tenant, now)} end
hold(tenant, rid, slot, ARGV[5], now + tonumber(ARGV[9]))
take(tenant, 1, prompt, now)
redis.call('PEXPIRE', limits, LIMITS_STAY)
return {'held', rate_left(tenant, now)}
