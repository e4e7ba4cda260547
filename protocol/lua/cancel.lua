-- Mark a request for ending and tell the scheduler.
-- KEYS: live. ARGV: P, rid, tenant, reason, attach count seen ('' = whatever it is)
-- -> 1 marked, 0 nothing to cancel, -1 no such request of this tenant
local rid, tenant, reason, seen = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local record = P .. 'r:' .. rid
allow_when_full()
local v = redis.call('HMGET', record, 'tenant', 'open', 'attached', 'cancel')
if v[1] ~= tenant then return -1 end
if v[2] == '0' or (seen ~= '' and tonumber(v[3]) > tonumber(seen)) then return 0 end
if not v[4] then
  redis.call('HSET', record, 'cancel', reason)
  redis.call('XADD', P .. 'events', '*', 'k', 'c', 'r', rid)
end
return 1
