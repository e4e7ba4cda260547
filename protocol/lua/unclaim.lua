-- Free an idempotency key whose request does not exist and never will (`void` has seen to that), let it expire with its
-- request, or put off the next look at it. Nothing where the key was claimed anew meanwhile.
-- It expires a little before the record does: a claim without a request would be completed, and then end too early. In that
-- time the request's own slot finds it by its key.
-- KEYS: the claim. ARGV: P, the claim's name, model, rid, the server's time at which the request's record goes ('' = free
--       the key now, 0 = it has not ended), milliseconds until the next look -> 1 if it was there
local EARLIER = 10000 -- milliseconds: more than two servers' clocks are apart
allow_when_full()
local key, sweep = P .. ARGV[2], P .. 'sweep:' .. ARGV[3]
if not string.find(redis.call('GET', key) or '', ARGV[3] .. ' ' .. ARGV[4] .. ' ', 1, true) then
  if redis.call('EXISTS', key) == 0 then redis.call('ZREM', sweep, ARGV[2]) end
  return 0
end
local gone, now = tonumber(ARGV[5]), tonumber(milliseconds())
if gone == 0 then
  redis.call('ZADD', sweep, now + tonumber(ARGV[6]), ARGV[2])
else
  redis.call('PEXPIRE', key, gone and math.max(1, gone - now - math.min(EARLIER, math.floor((gone - now) / 2))) or 0) -- gateways may not DEL
  redis.call('ZREM', sweep, ARGV[2])
end
return 1
