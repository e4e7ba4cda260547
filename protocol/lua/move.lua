-- End a request here because another model has accepted it too, only if nothing of it was said: no journal has a byte and
-- all choices are open. Its record becomes a pointer to the other one; readers here find it when they look at the record.
-- KEYS: live. ARGV: P, rid, tenant, '<model> <rid there>', milliseconds that the pointer stays
-- -> 'moved' (also when repeated) | 'stays' (it has begun, has ended, is to end, was moved elsewhere, or its results are
-- awaited here)
allow_when_full()
local rid, tenant, to = ARGV[2], ARGV[3], ARGV[4]
local record = P .. 'r:' .. rid
local v = redis.call('HMGET', record, 'tenant', 'open', 'n', 'cancel', 'moved', 'results')
if v[5] == to then return 'moved' end
if v[1] ~= tenant or v[2] ~= v[3] or v[4] or v[5] or (v[6] and v[6] ~= '') then return 'stays' end
local n = tonumber(v[3])
for choice = 0, n - 1 do
  if redis.call('EXISTS', P .. 'j:' .. rid .. ':' .. choice) == 1 then return 'stays' end
end
for choice = 0, n - 1 do redis.call('HSET', record, 'e' .. choice, 'abort') end
redis.call('HSET', record, 'open', 0, 'moved', to, 'body', '\128') -- an empty map: the other record has the body
local prompt = 0
while redis.call('HDEL', record, 'prompt:' .. prompt) == 1 do prompt = prompt + 1 end
retention = ARGV[5]
close_request(rid, record)
redis.call('XADD', P .. 'events', '*', 'k', 'c', 'r', rid)
return 'moved'
