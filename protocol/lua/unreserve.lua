-- End a reservation whose request was not accepted ('back': request and tokens are given back), or has ended; or put off
-- the next look at one whose request is there.
-- KEYS: the limits. ARGV: P, tenant, rid, 'back', 'ended' or milliseconds until the next look -> 1 if it was there
allow_when_full()
local tenant, rid, wait = ARGV[2], ARGV[3], tonumber(ARGV[4])
if wait then
  local slot = string.match(redis.call('HGET', P .. 'run:' .. tenant, rid) or '', '^%S+')
  if not slot then return 0 end
  redis.call('ZADD', P .. 'holds:' .. slot, milliseconds() + wait, tenant .. ' ' .. rid)
  return 1
end
local tokens = end_hold(tenant, rid)
if not tokens then return 0 end
if ARGV[4] == 'back' then take(tenant, -1, -tokens, tonumber(milliseconds())) end
return 1
