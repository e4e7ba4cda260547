-- In the home slot: take in what a model's slot owes (collect.lua). Batches of a slot are numbered: one that is repeated, or
-- comes late, counts once.
-- KEYS: settled. ARGV: P, slot, number, then `<tenant>`, tokens or `end:<rid>`, tenant -> 1, or 0: counted before
allow_when_full()
local settled, now = P .. 'settled', tonumber(milliseconds())
if tonumber(redis.call('HGET', settled, ARGV[2]) or 0) >= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', settled, ARGV[2], ARGV[3])
for i = 4, #ARGV, 2 do
  local rid = string.match(ARGV[i], '^end:(.+)$')
  if rid then end_hold(ARGV[i + 1], rid) else take(ARGV[i], 0, tonumber(ARGV[i + 1]), now) end
end
return 1
