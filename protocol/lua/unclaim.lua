-- Free an idempotency key whose request does not exist and never will (`void` has seen to that), or put off the next
-- look at it. Nothing where the key was claimed anew meanwhile.
-- KEYS: the claim. ARGV: P, the claim's name, model, rid, milliseconds until the next look ('' = free it) -> 1 if it was there
allow_when_full()
local key, sweep = P .. ARGV[2], P .. 'sweep:' .. ARGV[3]
if not string.find(redis.call('GET', key) or '', ARGV[3] .. ' ' .. ARGV[4] .. ' ', 1, true) then
  if redis.call('EXISTS', key) == 0 then redis.call('ZREM', sweep, ARGV[2]) end
  return 0
end
if ARGV[5] == '' then
  redis.call('PEXPIRE', key, 0) -- gateways may not DEL
  redis.call('ZREM', sweep, ARGV[2])
else
  redis.call('ZADD', sweep, milliseconds() + tonumber(ARGV[5]), ARGV[2])
end
return 1
