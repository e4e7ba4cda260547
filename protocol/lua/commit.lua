-- Journal and publish the rows of executed steps, and tell the scheduler. Counts as the worker's beat.
-- KEYS: leader. ARGV: P, epoch, wid, gen, retention, hint ('' = more calls follow),
--       verdicts of the calls before, first plan id to keep ('' = no trim), rows...
-- -> one verdict per row
allow_when_full()
local epoch, wid, gen, hint, before, keep_from = ARGV[2], ARGV[3], ARGV[4], ARGV[6], ARGV[7], ARGV[8]
if not is_leader(epoch) then return fenced('epoch') end
if not is_worker(wid, gen) then return fenced('gen') end
local verdicts, _, tenants = land_rows(9, ARGV[5])
for tenant, tokens in pairs(tenants) do
  owe(tenant, tokens)
  owe_money('out', tenant, tokens)
end
redis.call('HINCRBY', P .. 'w:' .. wid, 'beat', 1)
if hint ~= '' then
  local all = before .. verdicts
  if string.find(all, '[^l]') then
    redis.call('XADD', P .. 'events', '*', 'k', 'h', 'h', hint, 'v', all)
  else
    redis.call('XADD', P .. 'events', '*', 'k', 'h', 'h', hint)
  end
end
if keep_from ~= '' then redis.call('XTRIM', P .. 'plans:' .. wid, 'MINID', keep_from) end
return verdicts
