-- In the home slot: take in what a model's slot owes (collect.lua). Batches of a slot are numbered: one that is repeated, or
-- comes late, counts once.
-- KEYS: settled. ARGV: P, slot, number, then pairs of what is owed: `<tenant>`, tokens of its limit per minute;
--       `in:<tenant>`, `out:<tenant>`, tokens that are to be paid; `end:<rid>`, tenant -> 1, or 0: counted before
allow_when_full()
local settled, now = P .. 'settled', tonumber(milliseconds())
if tonumber(redis.call('HGET', settled, ARGV[2]) or 0) >= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', settled, ARGV[2], ARGV[3])
for i = 4, #ARGV, 2 do
  local what, named = string.match(ARGV[i], '^(%a+):(.+)$')
  if what == 'end' then
    end_hold(ARGV[i + 1], named)
  elseif what == 'in' then
    spend(named, cost(ARGV[2], tonumber(ARGV[i + 1]), 0), now)
  elseif what == 'out' then
    spend(named, cost(ARGV[2], 0, tonumber(ARGV[i + 1])), now)
  else
    take(ARGV[i], 0, tonumber(ARGV[i + 1]), now)
  end
end
return 1
