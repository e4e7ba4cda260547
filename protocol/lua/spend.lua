-- Count tokens that tenants have used on a day. The calls of an epoch are numbered: one that is repeated counts once.
-- KEYS: leader. ARGV: P, epoch, number, key without prefix, milliseconds to keep, then field, count, ... -> 1, or 0: repeated
allow_when_full()
local key = P .. ARGV[4]
local epoch, number = string.match(redis.call('HGET', key, 'at') or '', '^(%d+):(%d+)$')
if epoch == ARGV[2] and tonumber(number) >= tonumber(ARGV[3]) then return 0 end
for i = 6, #ARGV, 2 do redis.call('HINCRBY', key, ARGV[i], ARGV[i + 1]) end
redis.call('HSET', key, 'at', ARGV[2] .. ':' .. ARGV[3])
redis.call('PEXPIRE', key, ARGV[5])
return 1
